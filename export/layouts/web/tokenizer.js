// Texts to ids, by the tokenizer.json that lies beside a model.

import { Tokenizer } from "./vendor/tokenizers.min.mjs";

/** Return a function from texts to {ids: BigInt64Array, shape: [texts, length]}. */
export async function openTokenizer(folder, { length, takes_any_length }) {
  const [content, config] = await Promise.all(
    ["tokenizer.json", "tokenizer_config.json"].map(async (name) => (await fetch(new URL(name, folder))).json()),
  );
  const tokenizer = new Tokenizer(content, config);
  const ending = tokensAtTheEnd(tokenizer);
  const { pad_id: pad, direction } = content.padding;
  return (texts) => {
    const rows = texts.map((text) => shortened(tokenizer.encode(text).ids, length, ending));
    const wide = takes_any_length ? Math.max(...rows.map((row) => row.length)) : length;
    const ids = new BigInt64Array(rows.length * wide).fill(BigInt(pad));
    rows.forEach((row, i) => {
      const start = i * wide + (direction === "Left" ? wide - row.length : 0);
      row.forEach((id, j) => (ids[start + j] = BigInt(id)));
    });
    return { ids, shape: [rows.length, wide] };
  };
}

/** Return how many special tokens stand behind a text: those that two texts have in common there. */
function tokensAtTheEnd(tokenizer) {
  const [none, some] = ["", "a"].map((text) => tokenizer.encode(text).ids);
  let many = 0;
  while (many < none.length && none[none.length - 1 - many] === some[some.length - 1 - many]) many++;
  return many;
}

/** Cut what is too long in front of the special tokens at its end. */
function shortened(ids, length, ending) {
  return ids.length <= length ? ids : [...ids.slice(0, length - ending), ...ids.slice(ids.length - ending)];
}
