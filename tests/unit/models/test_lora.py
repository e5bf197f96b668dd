"""LoRA adapters of PEFT: merged into their base they compute what peft's own merge does; other adapters are refused."""

import json
import shutil

import pytest
import torch
from helpers import clipress
from oracles import run_oracle
from peft_oracle import CASES, REFUSED
from safetensors.torch import save_file

from clipress.artifact import load_artifact
from clipress.errors import ArtifactError, RecipeError
from clipress.models.importers import import_checkpoint, model_named
from clipress.models.load import artifact_from_model, new_model, save_for_open_clip
from clipress.models.tiny import tiny_architecture
from clipress.tasks import model_from_artifact

OF_OPEN_CLIP = "of open_clip"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return run_oracle("peft_oracle.py", tmp_path_factory.mktemp("peft"), beside=("peft",))


def assert_as_expected(model, folder):
    expected = torch.load(folder / "expected.pt", weights_only=True)
    pixels, ids = expected["inputs"]
    with torch.no_grad():
        found = model.module.encode_image(pixels), model.module.encode_text(ids)
    for rows, wanted in zip(found, expected["outputs"], strict=True):
        torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("case", [*CASES, OF_OPEN_CLIP])
def test_an_adapter_on_its_base_computes_what_peft_merges(theirs, case):
    base = theirs / ("open_clip" if case == OF_OPEN_CLIP else "base")
    assert_as_expected(import_checkpoint(theirs / case, base=base), theirs / case)


@pytest.mark.oracle
@pytest.mark.parametrize("case", [*CASES, OF_OPEN_CLIP])
def test_an_adapter_fits_an_artifact_of_its_base_too(theirs, case, tmp_path):
    base = theirs / ("open_clip" if case == OF_OPEN_CLIP else "base")
    assert clipress("import", base, tmp_path / "base").exit_code == 0
    result = clipress("import", theirs / case, tmp_path / "adapted", "--base", tmp_path / "base")
    assert result.exit_code == 0 and "modules merged into base)" in result.output
    assert_as_expected(model_from_artifact(tmp_path / "adapted"), theirs / case)
    before, after = (load_artifact(tmp_path / name) for name in ("base", "adapted"))
    assert after.lineage[:-1] == before.lineage and after.hash != before.hash


@pytest.mark.oracle
def test_the_base_that_an_adapter_names_is_taken_if_it_is_a_folder(theirs, tmp_path):
    shutil.copytree(theirs / "plain", tmp_path / "named")
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(theirs / "base"), "fan_in_fan_out": True}  # which peft ignores too
    (tmp_path / "named" / "adapter_config.json").write_text(json.dumps(config))
    assert_as_expected(import_checkpoint(tmp_path / "named"), theirs / "plain")


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("case", "found"), list(zip(REFUSED, ("use_dora", "init_lora_weights 'pissa'", "lora_bias"), strict=True))
)
def test_an_adapter_of_another_kind_is_refused_with_the_way_to_merge_it(theirs, case, found):
    with pytest.raises(ArtifactError, match=f"expected plain LoRA, found {found}.*merge_and_unload"):
        import_checkpoint(theirs / case, base=theirs / "base")


@pytest.mark.oracle
def test_an_adapter_on_torchs_own_attention_is_refused_since_peft_has_its_own_rule_there(theirs):
    with pytest.raises(ArtifactError, match=r"found it on torch's own attention.*merge_and_unload"):
        import_checkpoint(theirs / "of open_clip's attention", base=theirs / "open_clip")


MODULE = "transformer.resblocks.0.mlp.c_fc"
PAIR = {f"{MODULE}.lora_A.weight": (2, 32), f"{MODULE}.lora_B.weight": (128, 2)}


@pytest.fixture
def base(tmp_path):
    save_for_open_clip(new_model(tiny_architecture(), 0), tmp_path / "base")
    return tmp_path / "base"


def adapter(folder, shapes, **config):
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    state = {f"base_model.model.{name}": torch.ones(shape) for name, shape in shapes.items()}
    save_file(state, folder / "adapter_model.safetensors")
    return folder


def test_the_product_times_alpha_over_the_rank_is_added(base, tmp_path):
    plain, found = (
        import_checkpoint(base),
        import_checkpoint(adapter(tmp_path / "a", PAIR), base=base),
    )
    before, after = (one.module.get_parameter(f"{MODULE}.weight") for one in (plain, found))
    torch.testing.assert_close(after, before + 4 / 2 * 2)


@pytest.mark.parametrize(
    ("shapes", "config", "message"),
    [
        (PAIR, {"peft_type": "LOHA"}, "expected plain LoRA, found peft_type 'LOHA'"),
        (PAIR, {"a_later_setting": 1}, "expected plain LoRA, found a_later_setting"),
        (PAIR, {"lora_alpha": "much"}, "its adapter_config.json, lora_alpha"),
        (PAIR, {"alpha_pattern": {"(": 1}}, r"alpha_pattern '\(' cannot be used"),
        (PAIR, {"alpha_pattern": {"(.|..|...)+[!?]": 1}}, "cannot be used"),
        ({**PAIR, f"{MODULE}.lora_magnitude_vector": (128,)}, {}, "found .*lora_magnitude_vector"),
        ({f"{MODULE}.lora_A.weight": (2, 32)}, {}, r"lora_B\.weight is missing"),
        ({**PAIR, f"{MODULE}.lora_B.weight": (128, 3)}, {}, "have no rank in common"),
        ({**PAIR, f"{MODULE}.lora_A.weight": (2, 16)}, {}, r"\[128, 16\], the base \[128, 32\]"),
        ({"nowhere.lora_A.weight": (2, 32), "nowhere.lora_B.weight": (32, 2)}, {}, "no such tensor"),
        ({"nowhere.weight": (2, 32)}, {}, "no such tensor"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_message(base, tmp_path, shapes, config, message):
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(adapter(tmp_path / "a", shapes, **config), base=base)


def test_an_adapter_without_weights_is_one_message(base, tmp_path):
    adapter(tmp_path / "a", PAIR)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="expected the adapter's weights"):
        import_checkpoint(tmp_path / "a", base=base)


def test_a_base_is_needed_by_an_adapter_alone(base, tmp_path):
    folder = adapter(tmp_path / "a", PAIR, base_model_name_or_path="openai/clip-vit-base-patch32")
    result = clipress("import", folder, tmp_path / "out")
    assert result.exit_code == 2 and "it names 'openai/clip-vit-base-patch32'" in result.output
    assert "--base FOLDER" in result.output
    with pytest.raises(ArtifactError, match="is no folder"):
        import_checkpoint(folder, base=tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="expected no base"):
        import_checkpoint(base, base=base)
    with pytest.raises(RecipeError, match=r"teacher: .* holds an adapter\. Run `clipress import` first"):
        model_named(f"local-dir:{folder}", None, "teacher")


def test_a_base_that_is_compressed_is_refused(tmp_path):
    from clipress.artifact import save_artifact
    from clipress.models import anatomy, surgery

    model = new_model(tiny_architecture(), 0)
    part = anatomy.ffns(model.module)[0]
    surgery.cut(part, surgery.FfnMask(torch.arange(part.shape["ffn"]) > 0))
    save_artifact(artifact_from_model(model, ({"stage": "a", "hash": "a"},), {}), tmp_path / "cut")
    with pytest.raises(ArtifactError, match=r"is compressed\. Merge the adapter into the model before compression"):
        import_checkpoint(adapter(tmp_path / "a", PAIR), base=tmp_path / "cut")
