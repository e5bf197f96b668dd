"""Download images by URL with img2dataset, into shards that the `webdataset` format reads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from clipress.data.formats.captions import columns
from clipress.data.formats.table import is_quoted, rows_of
from clipress.data.spec import SourceSpec
from clipress.errors import DataError, import_extra

OWN_FORMATS = (".csv", ".jsonl", ".parquet")  # formats that img2dataset reads itself


def download(
    urls: Path,
    out: Path,
    *,
    size: int = 256,
    per_shard: int = 10_000,
    processes: int = 1,
    threads: int = 64,
    timeout: int = 10,
    url_key: str = "url",
    caption_key: str = "caption",
) -> None:
    """Download the images in a table: Conceptual Captions' TSV files, or csv, jsonl or parquet with named columns.

    Images whose shorter side exceeds `size` are shrunk to it. A second run continues with the missing shards. Raises
    DataError when the table is missing, and BackendMissing without img2dataset.
    """
    img2dataset = import_extra("img2dataset")
    if not urls.is_file():
        raise DataError(f"{urls}: no such file.")
    out.mkdir(parents=True, exist_ok=True)
    if urls.suffix.lower() not in OWN_FORMATS:
        urls, url_key, caption_key = _as_jsonl(urls, out / "urls.jsonl"), "url", "caption"
    img2dataset.download(
        url_list=str(urls),
        input_format=urls.suffix.lower().lstrip("."),
        url_col=url_key,
        caption_col=caption_key,
        output_folder=str(out),
        output_format="webdataset",
        image_size=size,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        number_sample_per_shard=per_shard,
        processes_count=processes,
        thread_count=threads,
        timeout=timeout,
        incremental_mode="incremental",
    )


def _as_jsonl(table: Path, target: Path) -> Path:
    """Rewrite a table of captions and URLs as JSON lines: img2dataset would parse quotation marks in a caption."""
    rows = partial(rows_of, table, "\t", "utf-8", is_quoted(table, "\t", SourceSpec(format="captions")))
    header, caption, width = columns(table, next(rows(), (0, 1, [""]))[2])
    if width != 2:
        raise DataError(f"{table}: expected lines with a caption and a URL, separated by a tab.")
    aside = target.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8") as file:  # line by line, since tables can have twelve million rows
        for _, number, cells in rows():
            if len(cells) == 2 and not (header and number == 1):
                file.write(json.dumps({"caption": cells[caption], "url": cells[1 - caption]}) + "\n")
    return aside.replace(target)
