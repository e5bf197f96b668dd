"""BLIP computed from the tensors of a published file, dense or slim, by its paper and the shapes in the file."""

import torch
import torch.nn.functional as F

SIZE, PATCH, VOCABULARY, POSITIONS, EMBED = 32, 16, 60, 24, 12
DEC, ENC = VOCABULARY - 2, VOCABULARY - 1
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "red", "?"]
TASKS = ("retrieval", "nlvr", "caption", "vqa")


def pixels(rows=2):
    return torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def texts(rows=2, length=7, seed=3):
    """Return ids and a mask; all rows but the first are padded."""
    ids = torch.randint(5, DEC, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < length - 2 * torch.arange(rows)[:, None]).long()
    return ids * mask, mask


def published(task, slim=False, layers=2, width=128, merges_from=1):
    """Return random tensors under the names of a file, without what is stored twice. A slim one has sizes of its own in every part."""
    rng = torch.Generator().manual_seed(1)
    state, heads = {}, width // 64

    def put(name, *sides):
        state[name] = torch.randn(sides, generator=rng) * (0.15 if len(sides) > 1 else 0.3)

    def linear(name, inputs, outputs):
        put(f"{name}.weight", outputs, inputs)
        put(f"{name}.bias", outputs)

    def norm(name):
        put(f"{name}.weight", width)
        put(f"{name}.bias", width)
        state[f"{name}.weight"] += 1

    def dims(most):
        return int(torch.randint(1, most, (), generator=rng)) if slim else most

    def attention(inside, outside, out, memory=width):
        k = dims(64) * heads
        for part, inputs in (("query", width), ("key", memory), ("value", memory)):
            linear(f"{inside}.{part}", inputs, k)
        linear(f"{outside}.{out}", k, width)

    put("visual_encoder.cls_token", 1, 1, width)
    put("visual_encoder.pos_embed", 1, (SIZE // PATCH) ** 2 + 1, width)
    put("visual_encoder.patch_embed.proj.weight", width, 3, PATCH, PATCH)
    put("visual_encoder.patch_embed.proj.bias", width)
    for layer in range(2):
        at, k, hidden = f"visual_encoder.blocks.{layer}", dims(64) * heads, dims(4 * width)
        norm(f"{at}.norm1"), norm(f"{at}.norm2")
        linear(f"{at}.attn.qkv", width, 3 * k), linear(f"{at}.attn.proj", k, width)
        linear(f"{at}.mlp.fc1", width, hidden), linear(f"{at}.mlp.fc2", hidden, width)
    norm("visual_encoder.norm")
    roots = {"caption": ("text_decoder.bert.",), "vqa": ("text_encoder.", "text_decoder.bert.")}
    for root in roots.get(task, ("text_encoder.",)):
        put(f"{root}embeddings.word_embeddings.weight", VOCABULARY, width)
        put(f"{root}embeddings.position_embeddings.weight", POSITIONS, width)
        norm(f"{root}embeddings.LayerNorm")
        for layer in range(layers):
            at, hidden = f"{root}encoder.layer.{layer}", dims(4 * width)
            attention(f"{at}.attention.self", f"{at}.attention.output", "dense")
            norm(f"{at}.attention.output.LayerNorm")
            for side in ("0", "1") if task == "nlvr" else ("",):
                attention(f"{at}.crossattention.self{side}", f"{at}.crossattention.output", f"dense{side}")
            norm(f"{at}.crossattention.output.LayerNorm")
            if task == "nlvr" and layer >= merges_from:
                linear(f"{at}.crossattention.output.merge_layer", 2 * width, width)
            linear(f"{at}.intermediate.dense", width, hidden), linear(f"{at}.output.dense", hidden, width)
            norm(f"{at}.output.LayerNorm")
    if task == "retrieval":
        linear("vision_proj", width, EMBED), linear("text_proj", width, EMBED), linear("itm_head", width, 2)
        put("temp")
    elif task == "nlvr":
        linear("cls_head.0", width, width), linear("cls_head.2", width, 2)
    else:
        linear("text_decoder.cls.predictions.transform.dense", width, width)
        norm("text_decoder.cls.predictions.transform.LayerNorm")
        put("text_decoder.cls.predictions.bias", VOCABULARY)
    return state


def stored_twice(state):
    """Return what a file holds once more: the output projection of the language head is the word embeddings."""
    if "text_decoder.cls.predictions.bias" not in state:
        return {}
    words = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    at = "text_decoder.cls.predictions."
    return {f"{at}decoder.weight": words.clone(), f"{at}decoder.bias": state[f"{at}bias"].clone()}


def save(state, folder, words=VOCABULARY - 2):
    """Write a file as it is published, and BERT's vocabulary beside it."""
    torch.save(
        {"model": {**state, **stored_twice(state)}, "optimizer": {}, "config": {"vit": "base"}}, folder / "blip.pth"
    )
    if words:
        pieces = [*PIECES, *(f"word{number}" for number in range(len(PIECES), words))]
        (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return folder / "blip.pth"


class Published:
    """A file's tensors, and what the published code computes from them."""

    def __init__(self, state):
        self.state = state
        self.heads = state["visual_encoder.cls_token"].shape[-1] // 64

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x, name, eps=1e-12):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def image(self, images):
        at = "visual_encoder"
        x = F.conv2d(images, *(self.state[f"{at}.patch_embed.proj.{n}"] for n in ("weight", "bias")), stride=PATCH)
        x = torch.cat([self.state[f"{at}.cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
        x = x + self.state[f"{at}.pos_embed"]
        for layer in range(2):
            block = f"{at}.blocks.{layer}"
            q, k, v = map(
                self.split, self.linear(self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
            )
            mixed = ((q @ k.mT) * 64**-0.5).softmax(-1) @ v
            x = x + self.linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
            hidden = F.gelu(self.linear(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
            x = x + self.linear(hidden, f"{block}.mlp.fc2")
        return self.norm(x, f"{at}.norm", 1e-6)

    def attention(self, x, memory, mask, inside, out):
        q, k, v = (
            self.split(self.linear(rows, f"{inside}.{part}"))
            for part, rows in (("query", x), ("key", memory), ("value", memory))
        )
        logits = (q @ k.mT) / q.shape[-1] ** 0.5  # of the dims that are left
        weights = (logits if mask is None else logits + (1.0 - mask) * -10000.0).softmax(-1)
        return self.linear((weights @ v).transpose(1, 2).flatten(2), out)

    def bert(self, root, ids, mask, memories=(), memory_mask=None, causal=False):
        at = f"{root}embeddings."
        x = self.state[f"{at}word_embeddings.weight"][ids]
        x = self.norm(x + self.state[f"{at}position_embeddings.weight"][: ids.shape[1]], f"{at}LayerNorm")
        own = mask[:, None, None, :].float()
        if causal:
            own = own * torch.ones(ids.shape[1], ids.shape[1]).tril()
        other = None if memory_mask is None else memory_mask[:, None, None, :].float()
        layer = 0
        while f"{root}encoder.layer.{layer}.output.dense.weight" in self.state:
            at = f"{root}encoder.layer.{layer}"
            y = self.attention(x, x, own, f"{at}.attention.self", f"{at}.attention.output.dense")
            x = self.norm(x + y, f"{at}.attention.output.LayerNorm")
            if memories:
                cross, sides = f"{at}.crossattention", [""] if len(memories) == 1 else ["0", "1"]
                y = [
                    self.attention(x, memory, other, f"{cross}.self{side}", f"{cross}.output.dense{side}")
                    for side, memory in zip(sides, memories, strict=True)
                ]
                merge = f"{cross}.output.merge_layer"
                y = self.linear(torch.cat(y, -1), merge) if f"{merge}.weight" in self.state else sum(y) / len(y)
                x = self.norm(x + y, f"{cross}.output.LayerNorm")
            y = self.linear(F.gelu(self.linear(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
            x, layer = self.norm(x + y, f"{at}.output.LayerNorm"), layer + 1
        return x

    def words(self, states):
        at = "text_decoder.cls.predictions"
        x = self.norm(F.gelu(self.linear(states, f"{at}.transform.dense")), f"{at}.transform.LayerNorm")
        return F.linear(x, self.state["text_decoder.bert.embeddings.word_embeddings.weight"], self.state[f"{at}.bias"])

    def retrieval(self, images, ids, mask):
        states = self.image(images)
        embeds = (
            self.linear(states[:, 0], "vision_proj"),
            self.linear(self.bert("text_encoder.", ids, mask)[:, 0], "text_proj"),
        )
        match = self.linear(self.bert("text_encoder.", marked(ids, ENC), mask, (states,))[:, 0], "itm_head")
        return *(rows / rows.norm(dim=-1, keepdim=True) for rows in embeds), match

    def nlvr(self, images, ids, mask):
        states = self.image(images)
        x = self.bert("text_encoder.", marked(ids, ENC), mask, (states[: len(ids)], states[len(ids) :]))[:, 0]
        return self.linear(self.linear(x, "cls_head.0").relu(), "cls_head.2")

    def caption(self, images, ids, mask):
        return self.words(self.bert("text_decoder.bert.", marked(ids, DEC), mask, (self.image(images),), causal=True))

    def vqa(self, images, ids, mask, answers, answers_mask, owners):
        states = self.bert("text_encoder.", marked(ids, ENC), mask, (self.image(images),))
        memory, memory_mask = ([rows[i] for i in owners] for rows in (states, mask))
        x = self.bert(
            "text_decoder.bert.",
            marked(answers, DEC),
            answers_mask,
            (torch.stack(memory),),
            torch.stack(memory_mask),
            True,
        )
        return self.words(x)


def marked(ids, mark):
    ids = ids.clone()
    ids[:, 0] = mark
    return ids


def inputs(task):
    """Return what a model of a task is called with, for two samples."""
    ids, mask = texts()
    if task != "vqa":
        return pixels(4 if task == "nlvr" else 2), ids, mask
    return pixels(), ids, mask, *texts(3, 6, seed=4), torch.tensor([0, 0, 1])
