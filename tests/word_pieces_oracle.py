"""Write ids that transformers' BertTokenizer gives to texts: FOLDER with vocab.txt and texts.json, into ids.json."""

import json
import sys
from pathlib import Path

from transformers import BertTokenizer

folder = Path(sys.argv[1])
tokenizer = BertTokenizer.from_pretrained(folder)
tokenizer.add_special_tokens({"bos_token": "[DEC]"})
tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
texts = json.loads((folder / "texts.json").read_text())
padded = tokenizer(texts, padding="longest", truncation=True, max_length=12)
found = {"ids": padded["input_ids"], "mask": padded["attention_mask"]}
found |= {"decode": tokenizer.convert_tokens_to_ids("[DEC]"), "encode": tokenizer.convert_tokens_to_ids("[ENC]")}
(folder / "ids.json").write_text(json.dumps(found))
