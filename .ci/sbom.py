"""CycloneDX JSON in, the same about clipress and without addresses out: names, versions, licences and who needs whom stay.

An address says where a thing is kept (homes, registries, the file a wheel was installed from), differs from one builder to
the next and identifies nothing; a purl does. Fails when an address or a path is left.
"""

import json
import re
import sys
from typing import Any

ADDRESS = re.compile(r"\w+://|file:|(?<![\w.])/(?:[\w.-]+/)+")


def without_addresses(node: Any) -> Any:
    """Return the same tree without external references, at any depth."""
    if isinstance(node, dict):
        return {key: without_addresses(value) for key, value in node.items() if key != "externalReferences"}
    return [without_addresses(value) for value in node] if isinstance(node, list) else node


def about(bom: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the SBOM with one of its components as its subject."""
    subject = next(component for component in bom["components"] if component["name"] == name)
    others = [component for component in bom["components"] if component is not subject]
    metadata = {**bom["metadata"], "component": {**subject, "type": "application"}}
    return {**bom, "metadata": metadata, "components": others}


def main() -> None:
    """Filter stdin to stdout."""
    bom = about(without_addresses(json.load(sys.stdin)), "clipress")
    bom.pop("$schema", None)  # an address too, and specVersion says the same
    text = json.dumps(bom, indent=1)
    if left := ADDRESS.search(text):
        sys.exit(f"An address is left in the SBOM: ...{text[max(0, left.start() - 80) : left.end() + 80]}...")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
