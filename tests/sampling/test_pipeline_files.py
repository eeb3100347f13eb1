"""Saving, loading and memory of pipelines; damaged folders are reported in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from raphael_dist.data.features.characters import CharacterModel, CharacterTokenizer
from raphael_dist.errors import UserError
from raphael_dist.pipeline import RaphaelPipeline
from tests.sampling.small_pipeline import PROMPTS, build, build_from, copy_of, draw, make_adapter


def test_saved_pipeline_comes_back_in_every_form(parts: dict[str, Any], pipeline: Any, tmp_path: Path) -> None:
    expected = draw(pipeline)
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1
    assert np.array_equal(draw(build_from(tmp_path / "sharded")), expected)

    without = build(parts, text_encoder=None, tokenizer=None)
    without.save_pretrained(tmp_path / "without")
    loaded = build_from(tmp_path / "without")
    assert loaded.text_encoder is None
    assert loaded.config.size == [32, 32]
    assert build_from(tmp_path / "sharded", text_encoder=None, tokenizer=None).text_encoder is None

    half = build_from(tmp_path / "sharded", torch_dtype=torch.float16)
    assert {half.unet.dtype, half.vae.dtype} == {torch.float16}
    np.testing.assert_allclose(draw(half), expected, atol=0.05)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = build_from(tmp_path / "half", variant="fp16", torch_dtype=torch.float16)
    assert np.array_equal(draw(again), draw(half))


def test_offload_and_slicing_change_no_image(parts: dict[str, Any], tmp_path: Path) -> None:
    build(parts).save_pretrained(tmp_path / "saved")
    expected = draw(build_from(tmp_path / "saved"), PROMPTS)
    pipeline = build_from(tmp_path / "saved")
    pipeline.enable_model_cpu_offload(device="cpu")
    np.testing.assert_allclose(draw(pipeline, PROMPTS), expected, atol=1e-5)
    pipeline.remove_all_hooks()
    pipeline.enable_vae_slicing()
    assert pipeline.vae.use_slicing
    np.testing.assert_allclose(draw(pipeline, PROMPTS), expected, atol=1e-5)
    pipeline.enable_vae_tiling()
    assert pipeline.vae.use_tiling
    assert draw(pipeline, height=128, width=128).shape == (1, 128, 128, 3)
    pipeline.disable_vae_slicing()
    pipeline.disable_vae_tiling()
    assert not pipeline.vae.use_slicing
    assert not pipeline.vae.use_tiling
    with pytest.raises(UserError, match=r"enable_vae_tiling\(\) requires a vae"):
        build(parts, vae=None).enable_vae_tiling()


def test_sequential_offload_changes_no_image(parts: dict[str, Any], tmp_path: Path) -> None:
    build(parts).save_pretrained(tmp_path / "saved")
    expected, pipeline = draw(build_from(tmp_path / "saved"), PROMPTS), build_from(tmp_path / "saved")
    # As enable_sequential_cpu_offload does, which requires a GPU. A module has its weights only during its own forward pass.
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        accelerate.cpu_offload(model, torch.device("cpu"))
    assert {parameter.device.type for parameter in pipeline.unet.parameters()} == {"meta"}
    np.testing.assert_allclose(draw(pipeline, PROMPTS), expected, atol=1e-5)
    pipeline._lora.adapters["x"] = make_adapter(pipeline.unet)
    with pytest.raises(UserError, match="before enable_sequential_cpu_offload"):
        pipeline.set_adapters("x")


def test_group_offload_to_disk_changes_no_image(pipeline: Any, tmp_path: Path) -> None:
    expected, other = draw(pipeline), copy_of(pipeline)
    with pytest.raises(ValueError, match="offload_type='block_level' must be 'leaf_level'"):
        other.unet.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    other.unet.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path))
    assert list(tmp_path.iterdir())
    assert np.array_equal(draw(other), expected)


def test_layerwise_casting_keeps_the_image(pipeline: Any) -> None:
    expected, other = draw(pipeline), copy_of(pipeline)
    other.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert other.unet.down_blocks[0].resnets[0].conv1.weight.dtype == torch.float8_e4m3fn
    assert np.abs(draw(other) - expected).mean() < 0.05


def test_pipeline_is_uploaded_after_it_is_complete(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[tuple[str, dict[str, Any]]] = []

    def upload(self: Any, folder: str, repo_id: str, **options: Any) -> None:
        assert json.loads((Path(folder) / "model_index.json").read_text())["_class_name"] == ["pipeline", "RaphaelPipeline"]
        assert (Path(folder) / "pipeline.py").is_file()
        assert (Path(folder) / "unet" / "modeling_raphael.py").is_file()
        uploads.append((repo_id, options))

    created = type("Created", (), {"repo_id": "me/blue"})
    for module in ("diffusers.utils.hub_utils", "diffusers.pipelines.pipeline_utils"):
        monkeypatch.setattr(f"{module}.create_repo", lambda *_, **__: created)
        monkeypatch.setattr(f"{module}.load_or_create_model_card", lambda *_, **__: ModelCard(""))
    monkeypatch.setattr(RaphaelPipeline, "_upload_folder", upload)
    pipeline.save_pretrained(tmp_path / "blue", push_to_hub=True, commit_message="blue", token="x")
    pipeline.push_to_hub("me/blue")
    assert [repo for repo, _ in uploads] == ["me/blue"] * 2
    assert uploads[0][1]["commit_message"] == "blue"
    assert (tmp_path / "blue" / "pipeline.py").is_file()


def test_named_text_encoder_is_left_out_on_request(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_model = (CharacterModel(), CharacterTokenizer())
    monkeypatch.setattr("raphael_dist.sampling.pipeline.packaged_text_model", lambda _: text_model)
    build(parts, text_encoder=None, tokenizer=None, text="minilm").save_pretrained(tmp_path / "named")
    index = tmp_path / "named" / "model_index.json"
    fields = {"text_encoder": [None, None], "tokenizer": [None, None], "text": "minilm"}
    index.write_text(json.dumps(json.loads(index.read_text()) | fields))
    named = build_from(tmp_path / "named")
    assert named.text_encoder is not None
    without = build_from(tmp_path / "named", text_encoder=None, tokenizer=None)
    assert (without.text_encoder, without.config.text) == (None, None)
    other = RaphaelPipeline.from_pipe(named, text_encoder=None, tokenizer=None)
    assert (other.text_encoder, other.config.text) == (None, None)
    assert RaphaelPipeline.from_pipe(named).text_encoder is named.text_encoder


def test_missing_folder_in_an_existing_one_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs/absent must be the folder of a pipeline.*No such file"):
        RaphaelPipeline.from_pretrained("runs/absent")


# ---- damaged folders --------------------------------------------------------------------------------------------------


def test_folder_that_is_no_pipeline_is_reported_in_one_line(tmp_path: Path) -> None:
    for content in (None, "{", "[]", json.dumps({"unet": ["a", "b"]})):
        if content is not None:
            (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(UserError, match=r"must be the folder of a pipeline.*model_index.json cannot be used") as error:
            RaphaelPipeline.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"must be the folder of a pipeline.*No such file"):
        RaphaelPipeline.from_pretrained(tmp_path / "missing")


@pytest.fixture(scope="module")
def saved(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    build(parts).save_pretrained(folder)
    return folder


def entry(**changes: Any) -> Any:
    """Return a function that changes entries of model_index.json in a folder."""

    def change(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text()) | changes
        (folder / "model_index.json").write_text(json.dumps(index))

    return change


def remove(name: str) -> Any:
    return lambda folder: (shutil.rmtree if (folder / name).is_dir() else Path.unlink)(folder / name)


def truncate(name: str) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


DAMAGE = {
    "class": (entry(_class_name=3), r"_class_name=3 must be the name of a class"),
    "no class": (entry(_class_name=[]), r"_class_name=\[\] must be the name of a class"),
    "no U-Net": (entry(unet=[None, None]), "the component unet is missing"),
    "no entry": (entry(scheduler=None), "the component scheduler is missing"),
    "entry": (entry(vae="AutoencoderKL"), "vae='AutoencoderKL' must be a library and the name of a class"),
    "unknown class": (entry(unet=["modeling_raphael", "Other"]), r"unet=.*'Other'.* must name one of .*RaphaelUNet2D"),
    "unknown class of diffusers": (entry(vae=["diffusers", "Other"]), "`diffusers` has no class `Other`"),
    "folder": (remove("unet"), "the folder unet is missing"),
    "folder of the scheduler": (remove("scheduler"), "the folder scheduler is missing"),
    "configuration": (remove("vae/config.json"), "no file named config.json found in directory .*vae"),
    "weights": (remove("unet/diffusion_pytorch_model.safetensors"), "unet must contain weights"),
    "truncated": (truncate("unet/diffusion_pytorch_model.safetensors"), "unet/.* cannot be read as a safetensors file"),
    "truncated text": (truncate("text_encoder/model.safetensors"), "text_encoder/.* cannot be read as a safetensors file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folder_is_reported_in_one_line(saved: Path, tmp_path: Path, name: str) -> None:
    change, message = DAMAGE[name]
    shutil.copytree(saved, tmp_path / "damaged")
    change(tmp_path / "damaged")
    with pytest.raises((UserError, ValueError, OSError), match=message) as error:
        RaphaelPipeline.from_pretrained(tmp_path / "damaged")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "damaged") in str(error.value) or "diffusers" in str(error.value)


def test_component_that_is_passed_may_be_missing(saved: Path, parts: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "part")
    for name in ("unet", "vae"):
        shutil.rmtree(tmp_path / "part" / name)
    pipeline = RaphaelPipeline.from_pretrained(tmp_path / "part", unet=parts["unet"], vae=None)
    assert pipeline.unet is parts["unet"]
