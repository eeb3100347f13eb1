"""The facts in the documents: commands run, what they name exists, tables agree with the code. Wording is free.

Commands are taken from the code blocks of DOCUMENTS and from text `in backticks` that begins with a program. A command that
matches NOT_RUN is left out, for the reason given there; any other must have a way to be run, or the test fails. Training is
planned (`--plan`) here and, at a size for tests, done by the slow cases; tools run on a tiny checkpoint, in a folder that
looks like the repository.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from raphael_dist import errors
from raphael_dist.config.load import preset_names
from raphael_dist.config.schema import Config, config_from_tree, load_config
from raphael_dist.config.training_stages import every_stage
from raphael_dist.convert.controlnet_files import write_control
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.layouts import names
from raphael_dist.convert.write_plan import Options
from raphael_dist.model.controlnet import ControlNet
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.runtime.ranks import free_port
from tests.data_prep.test_data_prep import folder_of
from tests.lib.checkpoints import KINDS, handmade_canonical, random_state
from tests.lib.documents import (
    COMMANDS,
    DOCUMENTS,
    Code,
    anchors_of,
    blocks_of,
    find_code,
    our_files,
    split_cell,
    table_of,
    text_of,
    words_of,
)
from tests.lib.launch import ROOT
from tests.lib.synthetic import TREE
from tests.repository.test_imports import ROOMS
from tests.training.test_training import SMALL

# Commands that are neither run nor parsed, as regular expressions, and why.
NOT_RUN = {
    r"(\w+=\S+ )*pip (install|wheel|check).*": "fetches packages; tests/repository/test_wheel.py builds a wheel",
    r"python3? -(m venv|c) .*": "makes an environment, or is Python's own",
    r"hf download .*": "fetches weights from the internet",
    r"scancel .*": "needs a cluster; tests/cluster/test_slurm.py cancels jobs and sends signals",
    r"sbatch( --\S+)+": "an option of sbatch without a script",
    r"mpirun .*raphael_dist/train\.py .*": "tests/cluster/test_slurm.py trains under mpirun",
    r"mpirun .*convert_checkpoint\.py .*": "tests/convert/test_mpi_ranks.py converts under mpirun",
}
# Placeholders in commands: an example of each, or nothing.
FILLED_IN = {"NAME": "emoji-tiny", "YOURS": "raphael-3b", "N": "2", "WORD": "optim"}
LEFT_OUT = ("...", "SBATCH-OPTIONS", "[options]")
INHERITED = {"from_pipe", "from_pretrained", "save_pretrained"}  # by our pipelines, from diffusers
# Files that documents name and the repository does not hold: written by runs and conversions, or of other projects.
NOT_OURS = """
    raphael_dist/convert/layouts/onefile.py
    samples.png unet/modeling_raphael.py
    results.csv curves.csv results.json results.md protocol.json adapter_config.json adapter_model.safetensors
    RUN/config.yaml NAME.json a.txt a.png.txt cat.txt cat.json metadata.jsonl metadata.csv
    models/stable-diffusion-2-base
    report.json proof/report.json
    metrics.jsonl my.yaml model_index.json slurm.conf logs/stacks-rank-N.txt logs/rank-NNNNN.log
    stage_1_and_2.py layer_L_expert_E_*.pt src/graph/tuning.cc csrc/grouped_gemm.cu
""".split()  # noqa: SIM905
OPTIONS_OF_OTHERS = """
    --no-deps --no-build-isolation
    --hostfile --module --no_ssh --node_rank --rdzv_backend
    --include --exclude --local-dir
    --exclusive --mem --shm-size --ntasks-per-node --cpus-per-task --nodes --signal --batch --time --help --nproc_per_node
""".split()  # noqa: SIM905
NO_FIELDS = ("edge.png",)  # members of a sample
SETTINGS_OF_OTHERS = {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "GROUPED_GEMM_CUTLASS", "TORCH_CUDA_ARCH_LIST"}

LARGER = {"upscale": {"factor": 2, "patch": 2}, "sample": {"steps": 2, "guidance": 1.0}}

CODE = find_code()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository, with a tiny run that ended: runs/demo, runs/photos, runs/words."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("raphael_dist", "tools", "slurm", "ds_configs", "tests", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("data", "models"):  # folders of their own: a command that writes there must not change the repository
        (folder / name).mkdir()
        for path in (ROOT / name).iterdir():
            (folder / name / path.name).symlink_to(path)
    (folder / "prompts.jsonl").write_text('{"prompt": "a red heart", "seed": 3, "size": [64, 64]}\n')
    demo = load_config("emoji-tiny").model_dump(mode="json")
    tiny = {"model": {**TREE["model"], "text_width": 384}, "edge": {"channels": 4}, "sample": {"steps": 2}}
    config = config_from_tree({name: {**section, **tiny.get(name, {})} for name, section in demo.items()})
    handmade_canonical(folder / "made", config, random_state(config, KINDS))
    convert("canonical", folder / "made", "raphael", folder / "runs" / "demo", Options())
    for name in ("photos", "words"):
        (folder / "runs" / name).symlink_to("demo")
    larger = config_from_tree({**config.model_dump(mode="json"), **LARGER})
    handmade_canonical(folder / "larger", larger, random_state(larger, KINDS))
    convert("canonical", folder / "larger", "raphael", folder / "runs" / "large", Options())
    write_lora(folder / "blue", config.model.channels[-1])
    control = ControlNet(config)
    write_control({name: p.detach() for name, p in control.named_parameters()}, config, folder / "edges")
    Image.new("RGB", (64, 64), "red").save(folder / "heart.png")
    Image.new("RGB", (32, 32), "red").save(folder / "small.png")
    return folder


def write_lora(folder: Path, width: int) -> None:
    """Write an adapter of one matrix, as peft does."""
    name = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    factors = {f"{name}.lora_A.weight": torch.ones(1, width), f"{name}.lora_B.weight": torch.ones(width, 1)}
    save_file(factors, folder / "adapter_model.safetensors")


@pytest.fixture(autouse=True)
def inside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "workspace" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("workspace"))


def write_config(words: list[str]) -> None:
    """Write the reader's own YAML file that `--config` names."""
    if "--config" in words:
        path = Path(words[words.index("--config") + 1])
        if path.suffix == ".yaml" and not path.is_absolute() and not path.exists():
            path.write_text("train: {max_steps: 5}\n")


class Parsed(Exception):  # noqa: N818 (no mistake)
    """Arguments were accepted; `args[0]` is what they became."""


class Runner:
    """Runs a command as far as the table at the end of the class says; anything wrong is an exception."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def run(self, words: list[str]) -> None:
        """Run a command by its first word that is known, `deepspeed` and such before the script that they start."""
        while re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        program, words = words[0], [FILLED_IN.get(word, word) for word in words[1:] if word not in LEFT_OUT]
        if program in ("python", "python3", ".venv/bin/python"):
            program, words = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        if program in COMMANDS:
            program, words = "raphael_dist", [program.removeprefix("raphael-"), *words]
        write_config(words)
        for pattern, run in self.WAYS.items():
            if re.fullmatch(pattern, program):
                return run(self, program, words)
        raise AssertionError(f"no way to run {program!r} is known: add one to Runner.WAYS, or the command to NOT_RUN")

    def main(self, program: str, words: list[str]) -> None:
        """Call the command's `main` in this process; it must return 0."""
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        self.patch.setattr(sys, "argv", [program, *words])
        try:
            code = module.main()
        except SystemExit as error:  # argparse's `--version`
            code = error.code
        assert not code

    def parse(self, program: str, words: list[str]) -> None:
        """Let the command read its arguments, and the configuration that they name, and stop there."""
        depth = 0

        def stopping(original: Callable[..., Any]) -> Callable[..., Any]:
            def parse(*args: Any, **kwargs: Any) -> Any:
                nonlocal depth
                depth += 1
                try:
                    found = original(*args, **kwargs)
                finally:
                    depth -= 1
                if depth:
                    return found
                raise Parsed(found)

            return parse

        with self.patch.context() as patch:
            for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
                patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
            with pytest.raises(Parsed) as parsed:
                self.main(program, words)
        args = parsed.value.args[0]
        if getattr(args, "config", None):
            load_config(args.config, getattr(args, "overrides", []))

    def plan(self, program: str, words: list[str], ranks: int = 1) -> None:
        """Do all that training does before it imports torch."""
        size = [] if "--world-size" in words else ["--world-size", str(ranks)]
        self.main(program, [*words, *size, *([] if {"--plan", "--dry-run"} & set(words) else ["--plan"])])

    def torchrun(self, program: str, words: list[str]) -> None:
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words)
        self.launched(args.training_script, args.training_script_args, int(args.nproc_per_node))

    def deepspeed(self, program: str, words: list[str]) -> None:
        from deepspeed.launcher.runner import parse_args

        args = parse_args(words)
        self.launched(args.user_script, args.user_args, max(1, args.num_gpus))

    def launched(self, script: str, words: list[str], ranks: int) -> None:
        if script == "raphael_dist/train.py":
            self.plan(script, words, ranks)
        else:
            self.run(["python", script, *words])

    def convert(self, program: str, words: list[str]) -> None:
        """Convert, unless the source is one that nobody has who follows the README."""
        if not Path(words[words.index("--from") + 2]).exists():
            return self.parse(program, words)
        shutil.rmtree(words[words.index("--to") + 2], ignore_errors=True)
        return self.main(program, words)

    def prepare(self, program: str, words: list[str]) -> None:
        """Make shards of the reader's folder, or of one with two images in its place."""
        if not Path(words[0]).exists():
            folder_of(Path(words[0]), 2)
        self.main(program, words)

    def inspect(self, program: str, words: list[str]) -> None:
        """Inspect, unless the path is one to be filled in."""
        (self.main if Path(words[0]).exists() else self.parse)(program, words)

    def pytest(self, program: str, words: list[str]) -> None:
        """Look up the file of the tests, and names of them that `-k` selects."""
        file, option, name = words
        assert option == "-k"
        assert re.search(rf"def test_\w*{name}", Path(file).read_text())

    def package(self, program: str, words: list[str]) -> None:
        """Run what a command of the package stands for."""
        name, *rest = words
        for pattern in (
            f"raphael_dist.{name}",
            f"raphael_dist.cli.{name}",
            f"raphael_dist/{name}.py",
            *Path("tools").glob(f"{name}_*.py"),
        ):
            if any(re.fullmatch(way, str(pattern)) for way in self.WAYS):
                return self.run(["python", *(["-m"] if "/" not in str(pattern) else []), str(pattern), *rest])
        return self.main("raphael_dist.__main__", words)

    def make(self, program: str, words: list[str]) -> None:
        assert {word for word in words if "=" not in word} <= make_targets()

    def bash(self, program: str, words: list[str]) -> None:
        """Look up an example, which tests/repository/test_examples.py runs; a script of Slurm's prints what it would do."""
        if words[0].startswith("docs/examples/"):
            assert (ROOT / words[0]).is_file()
        else:
            self.slurm(program, words)

    def slurm(self, program: str, words: list[str]) -> None:
        """Print what a script would do, without Slurm, and plan the training among it."""
        if program in ("sbatch", "bash"):
            first = next(i for i, word in enumerate(words) if word.endswith(".sh"))
            program, words = words[first], words[first + 1 :]
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        env |= {"DRY_RUN": "1", "PYTHON": "python3", "RUN_DIR": "runs/x"}
        done = subprocess.run(["bash", program, *words], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed = [shlex.split(line) for line in done.stdout.splitlines()]
        for line in printed:
            if "raphael_dist/train.py" in line:
                at = line.index("raphael_dist/train.py")
                self.plan(line[at], line[at + 1 :])
        assert printed

    WAYS: dict[str, Callable[..., None]] = {  # noqa: RUF012
        r"raphael_dist/train\.py": plan,
        r"raphael_dist\.(sample|cli\.routes)|tools/batch_plan\.py": main,
        r"tools/prepare_data\.py": prepare,
        r"raphael_dist\.cli\.(evaluate|prove|report|doctor)": parse,
        r"tools/inspect_(checkpoint|data)\.py": inspect,
        r"raphael_dist": package,
        r"pytest": pytest,
        r"tools/convert_checkpoint\.py": convert,
        # Benchmarks take minutes to hours, and so does the data set, which is fetched too.
        r"tools/(ablate|bench|classify_paths|emoji_benchmark|enlarge|index_shards)\.py": parse,
        r"tools/(make_(emoji|words)_dataset|plan_run|torture)\.py": parse,
        r"torchrun": torchrun,
        r"deepspeed": deepspeed,
        r"make": make,
        r"bash": bash,
        r"sbatch|slurm/\w+\.sh": slurm,
    }


RUN = [code for code in CODE if not any(re.fullmatch(pattern, code.text) for pattern in NOT_RUN)]


@pytest.mark.parametrize("code", RUN, ids=lambda code: code.place)
def test_documented_commands_run(code: Code, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(monkeypatch)
    if not code.text.startswith(("from ", "import ")):
        return runner.run(shlex.split(code.text))
    if not (workspace / "exported").exists():  # by an earlier command of the documents
        runner.run(shlex.split("python tools/convert_checkpoint.py --from auto runs/demo --to diffusers exported"))
    exec(code.text, {})
    return None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_configurations_load(document: str, workspace: Path) -> None:
    for block in blocks_of(document):
        if block.language in ("yaml", "yml"):
            (workspace / "documented.yaml").write_text("\n".join(block.lines))
            assert every_stage(load_config("documented.yaml")), f"{document}:{block.number}"


_OTHERS = r"(?!lora|control|upscale)"  # tests/model/test_lora.py, test_controlnet.py, test_super_resolution.py
TRAINING = [
    code
    for code in CODE
    if re.match(r"(deepspeed|torchrun|python) .*train\.py --config emoji-" + _OTHERS, code.text)
    and not re.search(r" --(plan|dry-run)\b", code.text)
]


@pytest.mark.slow
@pytest.mark.parametrize("code", TRAINING, ids=lambda code: code.place)
def test_training_commands_train(code: Code, workspace: Path, tmp_path: Path) -> None:
    """As written, on a CPU, with a tiny model and one step."""
    launcher = {"deepspeed": ["--master_port", str(free_port())], "torchrun": ["--master_port", str(free_port())]}
    program, *words = shlex.split(code.text)
    mine = [f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache", "train.max_steps=1", "sample.prompts=[]"]
    mine += ["data.shards=data/emoji-demo/train-*", "data.val_shards=[]"]
    at = words.index("--config")
    own = {word.partition("=")[0] for word in mine}
    words = [*words[:at], *SMALL, *(word for word in words[at + 2 :] if word.partition("=")[0] not in own)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = [program, *launcher.get(program, []), *words, *mine]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()


# ---- what is named exists -------------------------------------------------------------------------------------------


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document: str) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", text_of(document)):
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        if "://" not in target and not (
            file.exists() and (not anchor or anchor in anchors_of(str(file.resolve().relative_to(ROOT))))
        ):
            missing.append(target)
    assert missing == []


FOLDERS = re.compile(r"(?<![\w/.-])(?:raphael_dist|tools|tests|slurm|docs|ds_configs|models)/[\w./-]*(?![\w./{*-])")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_paths_exist(document: str) -> None:
    """Also in diagrams and blocks that are no commands."""
    paths = {path.rstrip(".") for path in FOLDERS.findall(text_of(document))} - set(NOT_OURS)
    assert {path for path in paths if not (ROOT / path).exists() and not re.search(r"[A-Z]{2}", path)} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    named = re.compile(r"[\w./{}*-]+\.(py|md|sh|json|jsonl|yaml|svg|csv|txt|log|conf|cc|cu|pt)")
    missing = [
        f"{document}:{number}: {word}"
        for number, word in words_of(document)
        if named.fullmatch(word) and word not in NOT_OURS and not any(path.endswith(f"/{word}") for path in our_files())
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_config_keys_exist(document: str) -> None:
    sections = Config.model_fields
    wrong = []
    for number, word in words_of(document):
        section, dot, rest = word.partition(".")
        field = re.match(r"([a-z_]+)(=|$)", rest)
        if dot and section in sections and field and not rest.startswith("py"):
            known = getattr(sections[section].annotation, "model_fields", {})
            of_a_module = any(
                f"def {field[1]}(" in (ROOT / path[1:]).read_text()
                for path in our_files()
                if path.endswith(f"/{section}.py")
            )
            if field[1] not in known and not of_a_module and word not in NO_FIELDS:
                wrong.append(f"{document}:{number}: {word}")
    assert wrong == []


def test_named_members_of_our_classes_exist() -> None:
    sources = [(ROOT / path[1:]).read_text() for path in our_files() if re.fullmatch(r"/raphael_dist/.*\.py", path)]
    wrong = []
    for document in DOCUMENTS:
        for number, word in words_of(document):
            named = re.match(r"([A-Z]\w+)\.([a-z]\w*)", word)
            if named and named[2] not in INHERITED:
                homes = [source for source in sources if f"class {named[1]}" in source]
                if homes and not any(re.search(rf"(def |self\.|    ){named[2]}\b", source) for source in homes):
                    wrong.append(f"{document}:{number}: {word}")
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_options_exist(document: str) -> None:
    ours = [path for path in our_files() if path.startswith(("/raphael_dist/", "/tools/")) and path.endswith(".py")]
    sources = "".join((ROOT / path[1:]).read_text() for path in ours)
    options = {word.partition("=")[0] for _, word in words_of(document) if re.match(r"--[a-z]", word)}
    assert {option for option in options if f'"{option}"' not in sources and option not in OPTIONS_OF_OTHERS} == set()


def test_named_make_targets_and_script_settings_exist() -> None:
    everything = "\n".join(map(text_of, DOCUMENTS))
    assert set(re.findall(r"`make ([\w-]+)`", everything)) <= make_targets()
    scripts = "".join(path.read_text() for path in (ROOT / "slurm").glob("*.sh"))
    settings = {m[1] for _, word in words_of("slurm/README.md") if (m := re.match(r"([A-Z]+_?[A-Z_]+)(=|$)", word))}
    assert {name for name in settings if not re.search(rf"\b{name}\b", scripts)} <= SETTINGS_OF_OTHERS


def test_named_extras_exist() -> None:
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    named = re.findall(r"(?:raphael_dist|\.)\[([\w,]+)\]", "\n".join(map(text_of, DOCUMENTS)))
    assert {extra for group in named for extra in group.split(",")} <= set(extras)


def test_citations_name_the_version() -> None:
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == version
    assert f"version = {{{version}}}" in text_of("README.md")


# ---- tables agree with the code -------------------------------------------------------------------------------------


def test_presets_are_listed_with_their_number_of_parameters() -> None:
    table = table_of(preset_names())
    assert sorted(table) == preset_names()
    for name, cells in table.items():
        size = next(match for cell in cells if (match := re.fullmatch(r"(\d+(?:\.(\d+))?) ([MB])", cell)))
        with torch.device("meta"):
            count = sum(p.numel() for p in RaphaelUNet(load_config(name)).parameters())
        number, decimals, unit = size[1], len(size[2] or ""), {"M": 1e6, "B": 1e9}[size[3]]
        assert f"{count / unit:.{decimals}f}" == number, f"{name} has {count:,} parameters"


PACKAGE_FOLDERS = set(ROOMS) - {"base", "entry"}


@pytest.mark.parametrize(
    "listed",
    [
        {path.name for path in (ROOT / "ds_configs").iterdir()},
        set(names()),
        {path.name for path in (ROOT / "slurm").glob("*.sh")} - {"common.sh"},
    ],
    ids=["ds_configs", "layouts", "slurm"],
)
def test_tables_list_everything_of_a_kind(listed: set[str]) -> None:
    assert set(table_of(listed)) == listed


def test_folders_of_the_package_are_listed_and_drawn() -> None:
    folders = {f"{name}/" for name in PACKAGE_FOLDERS}
    assert {cell for cell in table_of(folders) if cell.endswith("/")} == folders
    files = {path.name for path in (ROOT / "raphael_dist").glob("*.py")} - {"__init__.py"}
    drawn = set(re.findall(r"\w+/|\w+\.py", text_of("docs/modules.svg")))
    assert drawn >= {f"{folder}/" for folder in PACKAGE_FOLDERS} | files


def test_documented_exit_codes_are_those_of_the_code() -> None:
    codes = {str(value) for name, value in vars(errors).items() if name.startswith("EXIT_")} | {"0"}
    assert {code for cell in table_of(codes) for code in split_cell(cell) if code.isdigit()} == codes
    for document in DOCUMENTS:
        assert set(re.findall(r"exit code (\d+)", text_of(document))) <= codes, document
        for listing in re.findall(r"[Ee]xit codes: (.*?)(?:\n\n|\Z)", text_of(document), re.DOTALL):
            assert set(re.findall(r"(?:^|, |\n)(\d+) ", listing)) == codes, document
