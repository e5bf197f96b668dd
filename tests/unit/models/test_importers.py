"""Third-party checkpoints, written here in their exact layouts, match their source models."""

import argparse
import copy
import functools
import json
import os
import pathlib
import zipfile

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import clipress
from safetensors.torch import save_file

from clipress.artifact import load_artifact, save_artifact
from clipress.compress.pipeline import load_teacher
from clipress.errors import ArtifactError, RecipeError
from clipress.models import importers, surgery
from clipress.models.importers import IMPORTERS, Importer, artifact_from_checkpoint, detected, import_checkpoint
from clipress.models.load import TeacherSpec, agreed_preprocess, model_from_open_clip, new_model, save_for_open_clip
from clipress.models.students import start_hash, student_from
from clipress.models.tiny import tiny_architecture
from clipress.models.weights_file import weights_from_file
from clipress.storage import sha256
from clipress.tasks import model_from_artifact

TEXT = {"context_length": 77, "vocab_size": 500, "width": 128, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2, "head_width": 64}
RESNET = {"image_size": 64, "width": 16, "layers": [1, 2, 1, 1], "head_width": 64}
NOTES = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(500)}


@functools.cache
def source(quick_gelu=False, resnet=False):
    """Return a plain open_clip model with random biases and norms."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(64, dict(RESNET if resnet else VIT), dict(TEXT), quick_gelu=quick_gelu).eval()
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if "running_var" in name else tensor + 0.3 * torch.randn(()))
    for module in model.modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            torch.nn.init.normal_(module.in_proj_bias, std=0.5)
            torch.nn.init.normal_(module.in_proj_weight, std=0.2)
    return model


def inputs(size=32):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 400, (3, 77), generator=generator)
    ids[range(3), [5, 30, 76]] = 499
    return torch.randn(3, 3, size, size, generator=generator), ids


@torch.no_grad()
def outputs(model, size=32):
    pixels, ids = inputs(size)
    return model.encode_image(pixels), model.encode_text(ids)


def assert_same(model, wanted):
    for found, want in zip(outputs(model.module, model.preprocess.size), wanted, strict=True):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """Register the same architecture as a named open_clip config."""
    path = tmp_path_factory.mktemp("configs") / "importers-test.json"
    path.write_text(json.dumps({"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT}))
    open_clip.add_model_config(path)
    return path.stem


# Writers: from a state dict to the file that the third-party code saves.


def upop(state, twin=None):
    """The online model, its momentum model (other weights), queues, search masks and the run's settings."""
    twin = twin or state
    renamed = {}
    for key, tensor in twin.items():
        first, dot, rest = key.partition(".")
        if first != "logit_scale":
            renamed[f"{first}_m{dot}{rest}"] = torch.randn(tensor.shape)
    queues = {"image_queue": torch.randn(64, 96), "text_queue": torch.randn(64, 96)}
    queues |= {"idx_queue": torch.full((1, 96), -100), "ptr_queue": torch.zeros(1, dtype=torch.long)}
    masks = {"transformer.resblocks.0.alpha": torch.ones(1, 1, 512)}
    masks |= {"visual.transformer.resblocks.0.attn.alpha": torch.ones(1, 1, 64)}
    return {"model": {**state, **renamed, **queues, **masks}, "config": {"image_size": 32}, "epoch": 3}


def training(state):
    return {
        "epoch": 2,
        "name": "run",
        "state_dict": {f"module.{k}": v for k, v in state.items()},
        "optimizer": {"a": 1},
    }


def clip_kd(state):
    extras = {"visual_proj.weight": torch.randn(96, 64), "text_proj.weight": torch.randn(96, 64)}
    return training({**state, **extras, "cross_logit_scale": torch.ones(())})


def tinyclip(state, image="_image_encoder.module.", text="_text_encoder.module.", scale="_logit_scale.module."):
    def wrapped(key):
        return (image if key.startswith("visual.") else scale if key == "logit_scale" else text) + key

    return {"epoch": 6, "state_dict": {wrapped(key): tensor for key, tensor in state.items()}}


def tinyclip_without_ddp(state):
    return tinyclip(state, "module.image_encoder_without_ddp.", "module.text_encoder_without_ddp.", "_logit_scale.")


def bare(state):
    return dict(state)


DENSE = {
    "openai": (lambda state: {**state, **NOTES}, True, None, "auto"),
    "openai, numbers that are no tensors": (lambda state: {**state, "vocab_size": 500}, True, None, "auto"),
    "openai without notes": (bare, True, None, "openai"),
    "upop": (upop, True, None, "auto"),
    "open_clip training": (training, False, "named", "auto"),
    "open_clip bare": (bare, False, "named", "auto"),
    "clip-kd": (clip_kd, False, None, "auto"),
    "clip-kd by name": (clip_kd, False, "named", "auto"),
    "clip-kd without extras": (training, False, None, "clip-kd"),
    "tinyclip": (tinyclip, False, None, "auto"),
    "tinyclip by name": (tinyclip, False, "named", "auto"),
    "tinyclip without ddp": (tinyclip_without_ddp, False, None, "auto"),
}


@pytest.mark.parametrize("case", DENSE)
def test_an_imported_checkpoint_matches_its_source_model(case, name, tmp_path):
    write, quick_gelu, module, form = DENSE[case]
    stock = source(quick_gelu)
    torch.save(write(stock.state_dict()), tmp_path / "weights.pt")
    model = import_checkpoint(tmp_path / "weights.pt", form, module and name)
    assert_same(model, outputs(stock))
    assert model.preprocess.size == 32 and model.tokenizer["context_length"] == 77
    torch.testing.assert_close(model.module.logit_scale, stock.logit_scale)


WRITERS = {
    "tinyclip": tinyclip,
    "upop": upop,
    "clip-kd": clip_kd,
    "openai": lambda state: {**state, **NOTES},
    "open_clip": bare,
}


def test_every_importer_is_tested():
    elsewhere = {"transformers", "mobileclip", "deit", "segmenter", "blip"}  # in a test file of their own
    assert WRITERS.keys() | elsewhere == set(IMPORTERS)


@pytest.mark.parametrize("form", WRITERS)
def test_every_importer_detects_and_reads_its_format(form, name, tmp_path):
    quick_gelu = form in ("upop", "openai")
    stock = source(quick_gelu)
    torch.save(WRITERS[form](stock.state_dict()), tmp_path / "weights.pt")
    assert detected(weights_from_file(tmp_path / "weights.pt").state) == form
    assert_same(import_checkpoint(tmp_path / "weights.pt", model=name if form == "open_clip" else None), outputs(stock))


def test_a_registered_importer_is_detected(tmp_path):
    class Renamed(Importer):
        """A format with names that begin with `net.`."""

        priority = 60

        def recognises(self, state):
            return any(key.startswith("net.") for key in state)

        def model_from_state(self, state, model_name):
            own = {key.removeprefix("net."): tensor for key, tensor in state.items()}
            return IMPORTERS["openai"]().model_from_state(own, model_name)

    stock = source(quick_gelu=True)
    torch.save({f"net.{key}": tensor for key, tensor in stock.state_dict().items()}, tmp_path / "weights.pt")
    with IMPORTERS.registered("renamed", Renamed):
        assert_same(import_checkpoint(tmp_path / "weights.pt"), outputs(stock))
        (record,) = artifact_from_checkpoint(tmp_path / "weights.pt").lineage
    assert record["format"] == "renamed"


def test_formats_differ_in_activation_so_the_comparison_can_fail(tmp_path):
    stock = source(quick_gelu=True)
    torch.save(stock.state_dict(), tmp_path / "weights.pt")
    assert_same(import_checkpoint(tmp_path / "weights.pt", "openai"), outputs(stock))
    with pytest.raises(AssertionError):
        assert_same(import_checkpoint(tmp_path / "weights.pt", "clip-kd"), outputs(stock))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_fp32(dtype, tmp_path):
    stock = copy.deepcopy(source(quick_gelu=True)).to(dtype)
    torch.save({**stock.state_dict(), **NOTES}, tmp_path / "weights.pt")
    model = import_checkpoint(tmp_path / "weights.pt")
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    assert_same(model, outputs(stock.float()))


def test_openais_resnet_is_read(tmp_path):
    stock = source(quick_gelu=True, resnet=True)
    torch.save({**stock.state_dict(), **NOTES}, tmp_path / "weights.pt")
    model = import_checkpoint(tmp_path / "weights.pt")
    assert model.architecture["vision_cfg"] == RESNET and model.preprocess.size == 64
    assert_same(model, outputs(stock, 64))


def test_safetensors_are_read(name, tmp_path):
    stock = source()
    save_file(stock.state_dict(), tmp_path / "weights.safetensors")
    assert_same(import_checkpoint(tmp_path / "weights.safetensors", model=name), outputs(stock))


def test_a_custom_text_tower_takes_weights_in_the_old_naming(tmp_path):
    config = {"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True}
    (tmp_path / "importers-custom.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "importers-custom.json")
    stock = source()
    torch.save(stock.state_dict(), tmp_path / "weights.pt")
    model = import_checkpoint(tmp_path / "weights.pt", model="importers-custom")
    assert hasattr(model.module, "text")
    assert_same(model, outputs(stock))


# Slimmed UPop: an independent forward pass of the dense weights with the published slicing and scale.

KEPT = {  # Block: dims per head, hidden units.
    "visual.transformer.resblocks.0": (5, 100),
    "visual.transformer.resblocks.1": (64, 512),
    "transformer.resblocks.0": (1, 37),
    "transformer.resblocks.1": (33, 200),
}


def masks():
    """Return, per block, the dims of a head to keep (the same for all heads) and the hidden units to keep."""
    generator = torch.Generator().manual_seed(4)
    return {
        at: (
            torch.rand(64, generator=generator).argsort() < dim,
            torch.rand(512, generator=generator).argsort() < hidden,
        )
        for at, (dim, hidden) in KEPT.items()
    }


def slimmed(state):
    state = dict(state)
    for at, (alpha, hidden) in masks().items():
        for key in ("attn.in_proj_weight", "attn.in_proj_bias"):
            state[f"{at}.{key}"] = state[f"{at}.{key}"][alpha.repeat(3 * 2)]
        state[f"{at}.attn.out_proj.weight"] = state[f"{at}.attn.out_proj.weight"][:, alpha.repeat(2)]
        state[f"{at}.mlp.c_fc.weight"] = state[f"{at}.mlp.c_fc.weight"][hidden]
        state[f"{at}.mlp.c_fc.bias"] = state[f"{at}.mlp.c_fc.bias"][hidden]
        state[f"{at}.mlp.c_proj.weight"] = state[f"{at}.mlp.c_proj.weight"][:, hidden]
    return state


def reference_block(x, w, at, alpha, hidden, causal):
    def norm(x, which):
        return F.layer_norm(x, (128,), w[f"{at}.{which}.weight"], w[f"{at}.{which}.bias"])

    h, heads, k = norm(x, "ln_1"), [], int(alpha.sum())
    for head in range(2):
        rows = [torch.arange(64)[alpha] + 128 * part + 64 * head for part in range(3)]
        q, key, v = (h @ w[f"{at}.attn.in_proj_weight"][r].T + w[f"{at}.attn.in_proj_bias"][r] for r in rows)
        logits = q @ key.transpose(1, 2) / k**0.5
        if causal:
            logits = logits.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), float("-inf"))
        heads.append(logits.softmax(-1) @ v @ w[f"{at}.attn.out_proj.weight"][:, rows[0]].T)
    x = x + sum(heads) + w[f"{at}.attn.out_proj.bias"]
    h = norm(x, "ln_2") @ w[f"{at}.mlp.c_fc.weight"].T + w[f"{at}.mlp.c_fc.bias"]
    h = h * torch.sigmoid(1.702 * h) * hidden  # Quick GELU maps zero to zero.
    return x + h @ w[f"{at}.mlp.c_proj.weight"].T + w[f"{at}.mlp.c_proj.bias"]


@torch.no_grad()
def reference_outputs(w):
    pixels, ids = inputs()
    kept = masks()

    def norm(x, at):
        return F.layer_norm(x, (128,), w[f"{at}.weight"], w[f"{at}.bias"])

    x = F.conv2d(pixels, w["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.class_embedding"].expand(3, 1, 128), x], 1) + w["visual.positional_embedding"]
    x = norm(x, "visual.ln_pre")
    for n in range(2):
        at = f"visual.transformer.resblocks.{n}"
        x = reference_block(x, w, at, *kept[at], causal=False)
    image = norm(x[:, 0], "visual.ln_post") @ w["visual.proj"]
    x = w["token_embedding.weight"][ids] + w["positional_embedding"]
    for n in range(2):
        at = f"transformer.resblocks.{n}"
        x = reference_block(x, w, at, *kept[at], causal=True)
    text = norm(x, "ln_final")[range(3), ids.argmax(-1)] @ w["text_projection"]
    return image, text


@pytest.fixture
def slim_file(tmp_path):
    state = slimmed(source(quick_gelu=True).state_dict())
    torch.save(upop(state), tmp_path / "model_base_retrieval_coco_clip_4x.pth")
    return tmp_path / "model_base_retrieval_coco_clip_4x.pth"


def test_images_of_upops_models_are_squashed_as_its_code_does(slim_file):
    assert import_checkpoint(slim_file).preprocess.resize_mode == "squash"


def test_a_slimmed_upop_model_matches_the_published_code(slim_file):
    model = import_checkpoint(slim_file)
    assert_same(model, reference_outputs(source(quick_gelu=True).state_dict()))
    found = surgery.shapes(model.module)
    for at, (dim, hidden) in KEPT.items():
        assert found[at] == {"heads": 2, "qk_dim": dim, "v_dim": dim, "scale": dim**-0.5, "ffn": hidden}


def test_the_upop_reference_matches_open_clip_when_nothing_is_cut(monkeypatch):
    stock = source(quick_gelu=True)
    whole = {at: (torch.ones(64, dtype=torch.bool), torch.ones(512, dtype=torch.bool)) for at in KEPT}
    monkeypatch.setitem(globals(), "masks", lambda: whole)
    for found, wanted in zip(reference_outputs(stock.state_dict()), outputs(stock), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_slimmed_upop_is_detected_without_its_momentum_model(tmp_path):
    state = source(quick_gelu=True).state_dict()
    torch.save({"model": slimmed(state)}, tmp_path / "slim.pth")
    assert_same(import_checkpoint(tmp_path / "slim.pth"), reference_outputs(state))


def test_masks_that_were_not_applied_are_reported(tmp_path, caplog):
    saved = upop(source().state_dict())
    saved["model"]["transformer.resblocks.0.alpha"][..., 3] = 0
    torch.save(saved, tmp_path / "search.pth")
    import_checkpoint(tmp_path / "search.pth")
    assert "search masks that are not all 1" in caplog.text


def test_the_shapes_survive_saving_and_loading_the_artifact(slim_file, tmp_path):
    artifact = artifact_from_checkpoint(slim_file)
    save_artifact(artifact, tmp_path / "artifact")
    read = load_artifact(tmp_path / "artifact")
    assert read.shapes == artifact.shapes and read.counts == artifact.counts
    wanted = outputs(import_checkpoint(slim_file).module)
    for found, want in zip(outputs(model_from_artifact(read).module), wanted, strict=True):
        assert torch.equal(found, want)


# lineage, folders, reports


def test_the_lineage_starts_with_the_file(slim_file, tmp_path):
    (record,) = artifact_from_checkpoint(slim_file).lineage
    assert record["stage"] == "import" and record["format"] == "upop" and record["model"] is None
    assert record["file"] == slim_file.name and record["sha256"] == sha256(slim_file)
    assert record["hash"] == artifact_from_checkpoint(slim_file, "upop").hash
    torch.save(source().state_dict(), tmp_path / "dense.pt")
    as_openai, as_kd = (artifact_from_checkpoint(tmp_path / "dense.pt", form).hash for form in ("openai", "clip-kd"))
    assert as_openai != as_kd  # The same weights with another activation are another model.


def test_a_folder_needs_no_name(tmp_path):
    model = new_model({"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True}, 0)
    preprocess = model.preprocess.model_copy(update={"mean": (0.5, 0.4, 0.3), "resize_mode": "squash"})
    save_for_open_clip(type(model)(model.module, model.architecture, preprocess, model.tokenizer), tmp_path / "hub")
    read = import_checkpoint(tmp_path / "hub")
    assert_same(read, outputs(model.module.eval()))
    assert read.preprocess == preprocess
    (record,) = artifact_from_checkpoint(tmp_path / "hub").lineage
    assert (record["format"], record["file"]) == ("open_clip", "open_clip_model.safetensors")
    assert record["sha256"] == sha256(tmp_path / "hub" / "open_clip_model.safetensors")


@pytest.fixture
def folder(tmp_path):
    model = new_model(tiny_architecture(), 0)
    assert save_for_open_clip(model, tmp_path / "hub")
    return tmp_path / "hub"


def test_a_hub_folders_file_is_read_with_the_config_beside_it(folder):
    made, whole = (artifact_from_checkpoint(path) for path in (folder / "open_clip_model.safetensors", folder))
    assert made.hash == whole.hash and made.lineage[0]["preprocess"] == "from open_clip_config.json"
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(ArtifactError, match="Pass the open_clip model name"):
        artifact_from_checkpoint(folder / "open_clip_model.safetensors")


def test_a_hub_folder_with_a_tower_of_timm_is_read(tmp_path):
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": dict(TEXT), "custom_text": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    theirs = open_clip.model.CustomTextCLIP(32, dict(vision), dict(TEXT)).eval()
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    assert_same(import_checkpoint(tmp_path), outputs(theirs, 160))


def test_a_folder_without_weights_is_refused(folder):
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"expected a weights file.*open_clip_model\.safetensors.*found none"):
        import_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a folder with open_clip_config.json or config.json"),
        ("{", "not readable JSON"),
        ("[]", "lacks model_cfg"),
        ('{"model_cfg": {"vision_cfg": 3, "text_cfg": {}}}', "lacks model_cfg"),
        ('{"model_cfg": {"vision_cfg": {"width": -4}, "text_cfg": {}, "embed_dim": 8}}', "cannot build"),
        ('{"model_cfg": {"vision_cfg": {}, "text_cfg": {}, "embed_dim": 8}}', "by its architecture, found"),
    ],
)
def test_a_folder_with_a_bad_config_is_reported(folder, text, message):
    config = folder / "open_clip_config.json"
    config.unlink()
    if text is not None:
        config.write_text(text)
    with pytest.raises((ArtifactError, RecipeError), match=message):
        import_checkpoint(folder)


def test_a_config_that_requires_a_download_is_refused(folder):
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"]["timm_model_pretrained"] = True
    path.write_text(json.dumps(config))
    assert "timm_model_pretrained" not in import_checkpoint(folder).architecture["vision_cfg"]
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "some/text-model"}
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="comes from the hub's 'some/text-model'"):
        import_checkpoint(folder)


def test_a_folder_takes_no_name_and_no_format_of_files(folder, name):
    for given, message in (
        ({"form": "upop"}, "format 'upop' has no folders"),
        ({"model": name}, "expected no model name"),
    ):
        with pytest.raises(RecipeError, match=message):
            import_checkpoint(folder, **given)
    assert import_checkpoint(folder, "open_clip").architecture == import_checkpoint(folder).architecture


def test_leftovers_of_distillation_in_the_file_are_reported(tmp_path, caplog):
    torch.save(clip_kd(source().state_dict()), tmp_path / "weights.pt")
    import_checkpoint(tmp_path / "weights.pt")
    assert "3 tensors are not part of the CLIP and are ignored: cross_logit_scale, text_proj.weight" in caplog.text


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ("ViT-B-16-SigLIP", {"mean": (0.5, 0.5, 0.5), "resize_mode": "squash"}),
        ("ViT-L-14", {"resize_mode": "shortest"}),
    ],
)
def test_preprocessing_is_taken_from_the_pretrained_weights_of_a_name(known, wanted, caplog):
    agreed = agreed_preprocess(known)
    assert wanted.items() <= agreed.items()
    # The weights of ViT-L-14 were trained with different ones.
    assert ("mean" in agreed) == (known != "ViT-L-14") == ("differ in mean, std" not in caplog.text)


def test_a_teachers_weights_file_gets_the_preprocessing_of_its_models_published_weights(name, tmp_path, monkeypatch):
    torch.save(source().state_dict(), tmp_path / "s1.pt")
    published = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear", "resize_mode": "squash"}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: ["a", "b"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: published)
    model = model_from_open_clip(name, str(tmp_path / "s1.pt"))
    assert published.items() <= model.preprocess.model_dump().items() and model.preprocess.size == 32


def test_a_teachers_preprocessing_that_nobody_knows_is_said(name, tmp_path, caplog):
    torch.save(source().state_dict(), tmp_path / "own.pt")
    model_from_open_clip(name, str(tmp_path / "own.pt"))
    assert (
        f"{name}: no weights of this model are published whose preprocessing is known; open_clip's default"
        in caplog.text
    )
    caplog.clear()
    save_for_open_clip(new_model(tiny_architecture(), 0), tmp_path / "hub")
    teacher = TeacherSpec(model=f"local-dir:{tmp_path / 'hub'}")
    load_teacher(teacher, "clip", print)
    assert "preprocessing" not in caplog.text
    path = tmp_path / "hub" / "open_clip_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "preprocess_cfg": {}}))
    load_teacher(teacher, "clip", print)
    assert "teacher: preprocessing is CLIP's own, since the files do not say." in caplog.text


# files that are not weights


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("form", ["auto", "upop"])
def test_code_in_a_pickle_is_refused_and_not_run(form, zipped, tmp_path):
    saved = {"model": {"visual.proj": torch.ones(2, 2), "visual.x": Evil(tmp_path / "ran")}}
    torch.save(saved, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArtifactError, match=r"evil\.pth.*'visual.x' is \w+\.mkdir, which was not run"):
        import_checkpoint(tmp_path / "evil.pth", form)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # The file was able to run code.


def namespace(state):
    return {
        "state_dict": state,
        "args": argparse.Namespace(lr=1.0),
        "best_acc": np.float64(3.5),
        "run": pathlib.Path("a"),
    }


def averaged(state):
    return {"model": {name: torch.zeros_like(tensor) for name, tensor in state.items()}, "model_ema": state, "epoch": 3}


def compiled(state):
    inner = {name.replace("resblocks.0.", "resblocks.0._orig_mod."): tensor for name, tensor in state.items()}
    return {"model_state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in inner.items()}}


def lightning(state):
    others = {"loss.weight": torch.ones(3), "teacher.visual.proj": torch.ones(2, 2)}
    return {"state_dict": {**{f"model.clip.{name}": tensor for name, tensor in state.items()}, **others}, "loops": {}}


def with_left_overs(state):
    buffers = {"attn_mask": torch.zeros(77, 77), "text.position_ids": torch.arange(77)}
    return {"module": {**state, **buffers, "logit_scale": state["logit_scale"].reshape(1)}}


WRAPPED = {
    "arguments and numpy numbers beside the weights": (namespace, None, "entry state_dict"),
    "averaged weights beside the raw ones": (averaged, "ema", "entry model_ema, not model"),
    "averaged weights alone": (lambda state: {"state_dict_ema": state}, None, "entry state_dict_ema"),
    "averaged weights two entries in": (
        lambda state: {"model": {"ema_state_dict": state}},
        "ema",
        "entry model.ema_state_dict",
    ),
    "compiled, within DDP, and blocks compiled": (compiled, None, "entry model_state_dict"),
    "DDP within torch.compile": (
        lambda state: {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
        None,
        "entry model",
    ),
    "Lightning, in an attribute of an attribute": (
        lightning,
        None,
        "entry state_dict, tensors in model.clip., 2 others left out",
    ),
    "buffers of older versions, and a scale of shape [1]": (with_left_overs, None, "entry module"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("write", "which", "taken"), WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_in_what_trainers_wrap_them_in(write, which, taken, zipped, name, tmp_path):
    stock = source()
    torch.save(write(stock.state_dict()), tmp_path / "wrapped.pt", _use_new_zipfile_serialization=zipped)
    assert_same(import_checkpoint(tmp_path / "wrapped.pt", model=name, which=which), outputs(stock))
    words = ["--model", name, *(["--weights", which] if which else [])]
    result = clipress("import", tmp_path / "wrapped.pt", tmp_path / "artifact", *words)
    assert result.exit_code == 0 and load_artifact(tmp_path / "artifact").lineage[0]["taken"] == taken
    assert f"open_clip ({taken})" in result.output


def test_a_whole_module_in_the_old_format_is_read_by_its_tensors(name, tmp_path):
    torch.save(source(), tmp_path / "module.pt", _use_new_zipfile_serialization=False)
    assert_same(import_checkpoint(tmp_path / "module.pt", model=name), outputs(source()))


@pytest.mark.parametrize("place", [0.001, 0.01, 0.5, 0.999])
def test_a_damaged_file_in_the_old_format_is_refused(place, tmp_path):
    torch.save(source().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(place * len(content))])
    (tmp_path / "large.pt").write_bytes(content.replace(b"K@", b"M\xff\xff"))  # shapes and sizes of 64 become 65,535
    for damaged in ("cut.pt", "large.pt"):
        with pytest.raises(ArtifactError, match=rf"{damaged}: the file cannot be read"):
            import_checkpoint(tmp_path / damaged, "openai")


@pytest.mark.parametrize(
    ("tags", "said"), [([], "CLIP's own, since the files do not say"), (["a"], "as published with importers-test")]
)
def test_where_the_preprocessing_comes_from_is_printed_and_kept(tags, said, name, tmp_path, monkeypatch):
    torch.save(source().state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: tags)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"mean": (0.0, 0.0, 0.0)})
    result = clipress("import", tmp_path / "weights.pt", tmp_path / "artifact", "--model", name)
    assert f"preprocessing, {said}: 32 pixels" in result.output
    assert load_artifact(tmp_path / "artifact").lineage[0]["preprocess"] == said


@pytest.mark.parametrize(
    ("config", "said"), [({"mean": [0.1, 0.1, 0.1]}, "from open_clip_config.json"), ({}, "CLIP's own, since")]
)
def test_a_folders_config_may_tell_the_preprocessing(config, said, tmp_path):
    save_for_open_clip(new_model(tiny_architecture(), 0), tmp_path / "hub")
    path = tmp_path / "hub" / "open_clip_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "preprocess_cfg": config}))
    assert said in artifact_from_checkpoint(tmp_path / "hub").lineage[0]["preprocess"]


def test_averaged_and_raw_weights_of_one_file_are_different_models(name, tmp_path):
    torch.save(averaged(source().state_dict()), tmp_path / "both.pt")
    raw, ema = (artifact_from_checkpoint(tmp_path / "both.pt", "open_clip", name, which) for which in ("raw", "ema"))
    assert not raw.weights["visual.proj"].any() and ema.weights["visual.proj"].any() and raw.hash != ema.hash
    assert artifact_from_checkpoint(tmp_path / "both.pt", "open_clip", name).hash == raw.hash


def test_raw_weights_beside_averaged_ones_are_chosen_with_a_word(name, tmp_path, caplog):
    torch.save(averaged(source().state_dict()), tmp_path / "both.pt")
    load_teacher(TeacherSpec(model=name, checkpoint=str(tmp_path / "both.pt")), "clip", print)
    assert (
        "both.pt: raw weights are used (entry model); it has averaged ones too (model_ema). Choose with" in caplog.text
    )
    caplog.clear()
    for which in ("raw", "ema"):
        load_teacher(TeacherSpec(model=name, checkpoint=str(tmp_path / "both.pt"), weights=which), "clip", print)
    assert "averaged" not in caplog.text


def test_a_recipe_chooses_averaged_weights_of_a_teachers_or_a_students_file(name, tmp_path):
    torch.save(averaged(source().state_dict()), tmp_path / "both.pt")
    section = {"model": name, "checkpoint": str(tmp_path / "both.pt")}
    for which, has_values in ((None, False), ("raw", False), ("ema", True)):
        chosen = section | ({} if which is None else {"weights": which})
        teacher = load_teacher(TeacherSpec(**chosen), "clip", print)
        for module in (teacher.model.module, student_from(chosen, None, 0).module):
            assert bool(module.visual.proj.any()) == has_values
    with pytest.raises(RecipeError, match=r"teacher\.weights: 'random' has one kind of weights only"):
        load_teacher(TeacherSpec(model=name, checkpoint="random", weights="ema"), "clip", print)
    with pytest.raises(RecipeError, match=r"teacher\.weights: it is used with 'model'"):
        TeacherSpec(artifact=tmp_path, weights="ema")
    with pytest.raises(RecipeError, match=r"student\.weights: it is used with weights of others"):
        student_from({"model": name, "weights": "ema"}, None, 0)


def test_averaged_weights_that_a_file_lacks_are_refused(name, tmp_path):
    torch.save(source().state_dict(), tmp_path / "raw.pt")
    with pytest.raises(ArtifactError, match=r"expected averaged weights .*Leave out: --weights ema"):
        import_checkpoint(tmp_path / "raw.pt", model=name, which="ema")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("half", [False, True])
def test_a_torchscript_archive_is_read_and_not_run(half, tmp_path):
    """OpenAI's own files: traced, in float16, with the sizes as attributes."""
    stock = copy.deepcopy(source(quick_gelu=True))
    if half:
        stock = stock.half().float()  # what the file's numbers are worth
    wanted = outputs(stock)
    traced = torch.jit.trace_module(
        stock, {"encode_image": inputs()[0], "encode_text": inputs()[1]}, check_trace=False, strict=False
    )
    traced = traced.half() if half else traced
    for note, number in NOTES.items():
        traced._c._register_attribute(note, torch._C._jit_try_infer_type(int(number)).type(), int(number))
    torch.jit.save(traced, tmp_path / "ViT-B-32.pt")
    assert_same(import_checkpoint(tmp_path / "ViT-B-32.pt"), wanted)


def test_a_pickled_module_is_the_tensors_in_it(name, tmp_path):
    torch.save({"model": source(), "epoch": 1}, tmp_path / "module.pt")
    assert_same(import_checkpoint(tmp_path / "module.pt", model=name), outputs(source()))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "other.pt")
    with pytest.raises(ArtifactError, match="found none of them in 2 tensors: weight, bias"):
        import_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_reported(suffix, share, tmp_path):
    path, state = tmp_path / f"cut{suffix}", source().state_dict()
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ArtifactError, match=r"cut.*truncated, damaged"):
        import_checkpoint(path)


def test_a_compressed_bomb_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as old,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(ArtifactError, match=r"bomb.*claims 4,0"):
        import_checkpoint(tmp_path / "bomb.pt")


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere\.pt.*does not exist"):
        import_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([1, 2], "expected named weights, found list"),
        ({}, "expected named weights"),
        ({"state_dict": {}}, "expected named weights"),
        ({"visual.proj": "text"}, "'visual.proj' is str"),
        ({"visual.proj": {"a": torch.ones(1)}}, "'visual.proj' is dict"),
        ({3: torch.ones(1)}, "entry 3 is Tensor"),
        ({"visual.proj": 3}, "'visual.proj' is int"),
        ({"a": torch.zeros(1).expand(2**20 + 1)}, r"a: expected sides.*found shape \[1048577\]"),
        ({"a": torch.zeros(0, 4)}, r"a: expected sides.*found shape \[0, 4\]"),
        ({"a": torch.zeros(1).expand(2**20, 2**13)}, r"claims 34\.4 GB"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is torch._utils._rebuild_sparse_tensor, which was not run"),
        ({"a": torch.empty(3, device="meta")}, "'a' is torch._utils._rebuild_meta_tensor_no_storage"),
        (dict.fromkeys(map(str, range(2**16 + 1)), torch.ones(1)), "65,537 entries"),
        (
            {"epoch": torch.ones(1), "fc.weight": torch.ones(2)},
            "tinyclip, mobileclip, upop, clip-kd, deit, segmenter, blip, openai, transformers, open_clip.*found none.*epoch, fc.weight",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_is_not_a_clip_is_refused_with_what_was_found(saved, message, tmp_path):
    torch.save(saved, tmp_path / "odd.pt")
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(tmp_path / "odd.pt")


def test_arbitrary_bytes_are_reported(tmp_path):
    for seed in range(40):
        (tmp_path / "noise.pt").write_bytes(np.random.default_rng(seed).bytes(10 * seed))
        with pytest.raises(ArtifactError, match=r"noise\.pt"):
            import_checkpoint(tmp_path / "noise.pt")


# weights that do not fit

AT = "visual.transformer.resblocks.1."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.ln_post.bias": None}, "visual.ln_post.bias is missing"),
        ({"token_embedding.weight": None}, "token_embedding.weight is missing"),
        ({f"{AT}attn.in_proj_weight": None}, "in_proj_weight is missing"),
        (
            {f"{AT}mlp.c_fc.weight": torch.ones(512, 64)},
            r"1\.mlp\.c_fc\.weight: expected torch\.float32 \[512, 128\].*found torch\.float32 \[512, 64\]",
        ),
        ({f"{AT}attn.out_proj.weight": torch.ones(64, 128)}, r"out_proj\.weight: .*\[128, 128\].*\[64, 128\]"),
        ({"visual.proj": torch.ones(128, 64).long()}, r"visual\.proj: .*found torch\.int64"),
        ({"visual.positional_embedding": torch.ones(16, 128)}, "square number of positions plus one, found 16"),
        ({"visual.positional_embedding": torch.ones(1, 128)}, "square number of positions plus one, found 1"),
        (
            {"visual.conv1.weight": torch.ones(100, 3, 8, 8)},
            "conv1.weight: expected a width that is a multiple of 64.*found 100",
        ),
        ({"visual.conv1.weight": torch.ones(128, 192)}, r"conv1\.weight: expected 4 sides, found shape \[128, 192\]"),
        (
            {"positional_embedding": torch.ones(77, 2**19)},
            r"text_projection: expected .*\[524288, 64\]|for 8192 equal heads",
        ),
        (
            {"visual.class_embedding": torch.full((128,), float("nan"))},
            "class_embedding has values that are not finite",
        ),
        ({"visual.extra": torch.ones(2)}, "1 tensors have no place.*visual.extra"),
        ({"transformer.resblocks.7.ln_1.weight": torch.ones(128)}, r"resblocks\.2\.\S+ is missing"),
    ],
)
@pytest.mark.parametrize("form", ["openai", "upop"])
def test_the_tensor_that_does_not_fit_is_named(form, change, message, tmp_path):
    state = {**source().state_dict(), **change}
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "odd.pt")
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(tmp_path / "odd.pt", form)


@pytest.mark.parametrize("rows", [3 * 2 * 5 + 3, 3])
def test_upop_rows_that_do_not_form_equal_heads_are_named(rows, tmp_path):
    saved = upop({**source().state_dict(), f"{AT}attn.in_proj_weight": torch.ones(rows, 128)})
    torch.save(saved, tmp_path / "odd.pth")
    with pytest.raises(
        ArtifactError, match=rf"1\.attn\.in_proj_weight: expected .*q, k and v for 2 equal heads, found {rows} rows"
    ):
        import_checkpoint(tmp_path / "odd.pth")


def test_a_slim_attention_with_a_mismatched_output_is_named(tmp_path):
    state = slimmed(source().state_dict())
    state["visual.transformer.resblocks.0.attn.out_proj.weight"] = torch.ones(128, 12)
    torch.save(upop(state), tmp_path / "odd.pth")
    with pytest.raises(ArtifactError, match=r"out_proj\.weight: .*\[128, 10\].*\[128, 12\]"):
        import_checkpoint(tmp_path / "odd.pth")


@pytest.mark.parametrize("cut", ["masks", "heads", "width"])
def test_auto_inherited_tinyclip_is_refused(cut, tmp_path):
    state = source().state_dict()
    if cut == "masks":
        state = {**state, "visual.l0": torch.ones(1)}
    if cut == "heads":
        state[f"{AT}attn.in_proj_weight"] = torch.ones(3 * 64, 128)
    if cut == "width":
        state[f"{AT}attn.in_proj_weight"] = torch.ones(300, 100)
    saved = tinyclip(state)
    if cut == "masks":
        saved["state_dict"] = {
            k.replace("visual.l0", "l0_module.heads_loga"): v for k, v in saved["state_dict"].items()
        }
    torch.save(saved, tmp_path / "auto.pt")
    with pytest.raises(ArtifactError, match="auto-inherited TinyCLIP"):
        import_checkpoint(tmp_path / "auto.pt")


# formats and names


def test_an_ambiguous_format_is_not_guessed(tmp_path):
    torch.save(training(source().state_dict()), tmp_path / "epoch_1.pt")
    with pytest.raises(ArtifactError, match=r"do not reveal the activation.*openai for QuickGELU, clip-kd for GELU"):
        import_checkpoint(tmp_path / "epoch_1.pt")


def test_an_unknown_format_names_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match="Did you mean 'open_clip'"):
        import_checkpoint(tmp_path / "a.pt", "openclip")


@pytest.mark.parametrize(
    ("given", "message"), [("importers-tset", "'importers-test'"), ("hf-hub:some/model", "no model")]
)
def test_an_unknown_model_name_is_reported(given, message, name, tmp_path):
    torch.save(source().state_dict(), tmp_path / "a.pt")
    with pytest.raises(RecipeError, match=message):
        import_checkpoint(tmp_path / "a.pt", model=given)


@pytest.mark.parametrize("form", ["openai", "upop"])
def test_a_model_name_is_refused_where_shapes_define_the_model(form, name, tmp_path):
    torch.save(source().state_dict(), tmp_path / "a.pt")
    with pytest.raises(RecipeError, match="Leave it out"):
        import_checkpoint(tmp_path / "a.pt", form, name)


@pytest.mark.parametrize(("write", "which", "taken"), WRAPPED.values())
def test_a_teachers_weights_file_is_read_as_an_import_is(write, which, taken, name, tmp_path):
    torch.save(write(source().state_dict()), tmp_path / "teacher.pt")
    if which != "ema":
        assert_same(model_from_open_clip(name, str(tmp_path / "teacher.pt")), outputs(source()))


def test_a_teacher_from_openais_own_file_has_its_activation_whatever_the_name_says(name, tmp_path):
    stock = source(quick_gelu=True)
    torch.save({**stock.state_dict(), **NOTES}, tmp_path / "ViT-B-32.pt")
    model = model_from_open_clip(name, str(tmp_path / "ViT-B-32.pt"))
    assert_same(model, outputs(stock))
    assert model.architecture["quick_gelu"] is True


def test_a_teachers_position_table_is_resized_to_its_models_image_size(name, tmp_path):
    larger = open_clip.model.CLIP(64, {**VIT, "image_size": 48}, dict(TEXT))
    torch.save(larger.state_dict(), tmp_path / "larger.pt")
    model = model_from_open_clip(name, str(tmp_path / "larger.pt"))
    assert model.module.visual.positional_embedding.shape == (17, 128)
    torch.testing.assert_close(model.module.visual.positional_embedding[0], larger.visual.positional_embedding[0])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("change", [{"image_size": 48}, {"image_size": 16}, {"context_length": 40}])
def test_position_tables_of_an_imported_file_are_resized_as_open_clip_does(change, half, name, tmp_path):
    vision = {**VIT, **{k: v for k, v in change.items() if k in VIT}}
    text = {**TEXT, **{k: v for k, v in change.items() if k in TEXT}}
    state = open_clip.model.CLIP(64, vision, text).state_dict()
    state = {key: tensor.half() for key, tensor in state.items()} if half else state
    torch.save(state, tmp_path / "other-size.pt")
    plain = open_clip.model.CLIP(64, dict(VIT), dict(TEXT)).eval()
    wanted = {key: tensor.float() for key, tensor in state.items()}
    open_clip.model.resize_pos_embed(wanted, plain)
    open_clip.model.resize_text_pos_embed(wanted, plain)
    plain.load_state_dict(wanted)
    for model in (
        import_checkpoint(tmp_path / "other-size.pt", model=name),
        model_from_open_clip(name, str(tmp_path / "other-size.pt")),
    ):
        assert model.preprocess.size == 32
        assert_same(model, outputs(plain))


@pytest.mark.parametrize(
    "table", [torch.ones(20, 128), torch.ones(1, 128), torch.ones(26, 64), torch.ones(26, 128).long()]
)
def test_a_table_that_is_no_grid_of_this_model_is_named(table, name, tmp_path):
    torch.save({**source().state_dict(), "visual.positional_embedding": table}, tmp_path / "odd.pt")
    with pytest.raises(ArtifactError, match=r"visual\.positional_embedding"):
        import_checkpoint(tmp_path / "odd.pt", model=name)
    with pytest.raises(ArtifactError, match=r"odd\.pt"):
        model_from_open_clip(name, str(tmp_path / "odd.pt"))


def test_a_config_whose_images_are_smaller_than_a_patch_is_one_message(folder):
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"visual\.positional_embedding: expected .*\[1, "):
        import_checkpoint(folder)


def test_a_teacher_in_a_folder_needs_no_checkpoint(tmp_path):
    saved = new_model({"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True}, 0)
    folder, wanted = tmp_path / "hub", outputs(saved.module.eval())
    assert save_for_open_clip(saved, folder)
    spec = TeacherSpec(model=f"local-dir:{folder}")
    assert_same(load_teacher(spec, "clip", print).model, wanted)
    assert_same(student_from({"model": spec.model}, None, 0), wanted)
    before = start_hash({"model": spec.model}, 0)
    assert start_hash({"model": spec.model}, 0) == before
    (folder / "open_clip_model.safetensors").write_bytes(b"other weights")
    assert start_hash({"model": spec.model}, 0) != before
    with pytest.raises(RecipeError, match=r"holds its own weights.*Leave it out"):
        load_teacher(TeacherSpec(model=spec.model, checkpoint="random"), "clip", print)
    with pytest.raises(RecipeError, match="image_size are the checkpoint's"):
        student_from({"model": spec.model, "image_size": 64}, None, 0)


def test_a_teachers_folder_that_is_missing_is_one_message(tmp_path):
    with pytest.raises(ArtifactError, match=r"teacher: expected a folder at .*nowhere, found none"):
        load_teacher(TeacherSpec(model=f"local-dir:{tmp_path / 'nowhere'}"), "clip", print)


def test_teachers_with_the_same_weights_and_another_activation_have_other_hashes(tmp_path):
    saved = new_model({"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True}, 0)
    assert save_for_open_clip(saved, tmp_path / "hub")
    spec = TeacherSpec(model=f"local-dir:{tmp_path / 'hub'}")
    before = load_teacher(spec, "clip", print).hash
    assert load_teacher(spec, "clip", print).hash == before
    config = tmp_path / "hub" / "open_clip_config.json"
    config.write_text(config.read_text().replace('"quick_gelu": true', '"quick_gelu": false'))
    assert load_teacher(spec, "clip", print).hash != before


def test_a_folder_is_open_clips_where_it_has_both_configs_whatever_was_imported_first(tmp_path, monkeypatch):
    for name in ("config.json", "open_clip_config.json"):
        (tmp_path / name).write_text("{}")
    for order in (list(IMPORTERS.items()), list(IMPORTERS.items())[::-1]):
        monkeypatch.setattr(importers, "IMPORTERS", dict(order))
        assert importers._folder_format(tmp_path, "auto") == "open_clip"
