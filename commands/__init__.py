"""Commands: one file per group of help pages. They parse options, call `workflow` and print."""
