"""qcli's methods beside other libraries: KL to the unquantized model, bits of a weight, and what quantizing takes, in one run.

    python benchmarks/peers.py [MODEL ...] [--peer NAME=PYTHON ...] [--text FILE] [--calibration FILE] [--only PATTERN ...] [--add]

Each peer runs in the environment of its own interpreter, which `--peer` names: bitsandbytes, hqq, torchao, quanto, llm-compressor,
auto-round, llama.cpp (the package xllamacpp). Peers without one are left out, and the result says so. A MODEL is a folder; without
any, the demo model is measured. With --add, rows go to those that are saved, in the place of any of the same name.

A row is what a library made of the linear layers that `qcli quantize` takes. benchmarks/peers_run.py quantizes them and writes what
the codes stand for, as float32. All rows are measured here, by the protocol of `qcli evaluate`, on the same tokens: float32,
windows that begin with BOS, KL(unquantized || quantized) over the whole vocabulary. Activations are not rounded, in any row. The
first half of the text is measured. Methods that calibrate read the second half, unless `--calibration` names another text.

Writes benchmarks/results/peers-MODEL.json. Seconds are those of one thread unless OMP_NUM_THREADS says otherwise.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from benchmarks.measure import machine  # noqa: E402
from benchmarks.peers_rows import TOOLS, order, rows_of  # noqa: E402
from benchmarks.rows import result_path, save  # noqa: E402
from qcli import console  # noqa: E402
from qcli.evaluation.statistics import mean, perplexity  # noqa: E402
from qcli.evaluation.tokens import TokenScores, log_probabilities  # noqa: E402
from qcli.streaming.corpus import BUNDLED, Corpus, read_windows  # noqa: E402
from qcli.streaming.skeleton import Skeleton  # noqa: E402

CALIBRATION_LENGTH = 256  # tokens of a window to calibrate on
SECONDS = 900  # for a row


class Measured:
    """The unquantized model in float32, and the windows on which it is compared with others."""

    def __init__(self, folder: str, corpus: Corpus):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.corpus = corpus
        self.unquantized = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.base = [self._logits(window) for window in corpus.windows]
        self.perplexity = perplexity(self._scores(None).loss, corpus.scored_bytes).perplexity.value

    def _logits(self, window) -> torch.Tensor:
        """Logits [tokens, vocabulary] that predict the scored tokens of a window."""
        with torch.no_grad():
            return self.model(torch.tensor([window.ids])).logits[0, window.context - 1 : -1].clone()

    def _scores(self, base: list[torch.Tensor] | None) -> TokenScores:
        scores, first = TokenScores(self.corpus.scored, compared=base is not None), 0
        for number, window in enumerate(self.corpus.windows):
            logits = self._logits(window) if base else self.base[number]
            targets = torch.tensor(window.ids[window.context :])
            for at in range(0, window.scored, 256):
                part = slice(at, at + 256)
                of_base = log_probabilities(base[number][part]) if base else None
                scores.add(first + at, logits[part], targets[part], of_base)
            first += window.scored
        return scores

    def compare(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        """The costs of parameters by name in place of the model's own."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights.get(name, self.unquantized[name]))
        scores = self._scores(self.base)
        kl = mean(scores.divergence)
        return {
            "kl": float(f"{kl.value:.4g}"),
            "kl_error": float(f"{kl.error:.2g}"),
            "perplexity": float(f"{perplexity(scores.loss, self.corpus.scored_bytes).perplexity.value:.6g}"),
            "same_top1": round(float(scores.agrees.mean()), 4),
        }

    def moments(self, linears: list[str], windows: list[list[int]]) -> dict[str, torch.Tensor]:
        """The mean square of each input column [in_features] of each linear layer over the windows."""
        sums: dict[str, torch.Tensor] = {}

        def gather(name: str):
            def hook(_, inputs) -> None:
                sums[name] = sums.get(name, 0) + inputs[0].double().square().sum((0, 1))

            return hook

        handles = [self.model.get_submodule(name).register_forward_pre_hook(gather(name)) for name in linears]
        with torch.no_grad():
            for ids in windows:
                self.model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        return {name: (total / sum(map(len, windows))).float() for name, total in sums.items()}


class Peer:
    """An interpreter with benchmarks/peers_run.py. Answers line for line."""

    def __init__(self, name: str, python: str, log):
        program = [python, str(Path(__file__).with_name("peers_run.py")), name]
        environment = os.environ | {"PYTHONPATH": str(ROOT) if name == "qcli" else "", "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        self.process = subprocess.Popen(program, text=True, env=environment, **pipes)
        self.versions = self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"the interpreter ended with {self.process.wait()}; see build/peers.log"}

    def ask(self, job: dict) -> dict:
        """The figures of a job, or its `error`."""
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the interpreter."""
        self.process.stdin.close()
        self.process.wait()


def texts(args: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """Files of the text to measure, and of the one to calibrate on."""
    text = Path(args.text).read_text() if args.text else files("qcli").joinpath("data", "corpus.txt").read_text()
    if args.calibration:
        return args.text or _written(folder / BUNDLED, text), args.calibration
    half = text.index("\n", len(text) // 2)
    name = Path(args.text).name if args.text else BUNDLED
    return _written(folder / name, text[:half]), _written(folder / f"{name}, second half", text[half:])


def _written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def measure(model: str, args: argparse.Namespace, folder: Path, log) -> Iterator[dict]:
    """The result for one model, after each of its rows."""
    skeleton, tokenizer = Skeleton(model, dtype="float32"), AutoTokenizer.from_pretrained(model)
    linears = [linear.module for linear in skeleton.layout.quantizable()]
    limit = skeleton.model.config.max_position_embeddings
    of_text, of_calibration = texts(args, folder)
    measured = Measured(model, read_windows(tokenizer, of_text, default_tokens=args.tokens, model_limit=limit))
    short = CALIBRATION_LENGTH
    corpus = read_windows(tokenizer, of_calibration, default_tokens=args.calibration_tokens, sequence_length=short)
    windows = [list(window.ids) for window in corpus.windows if len(window.ids) == short]
    (folder / "calibration.json").write_text(json.dumps(windows))
    save_file(measured.moments(linears, windows), folder / "moments.safetensors")
    weights = folder / "weights.safetensors"
    job = {"model": str(model), "linears": linears, "weights": str(weights), "timeout": SECONDS}
    job |= {"text": of_calibration, "calibration": str(folder / "calibration.json"), "moments": str(folder / "moments.safetensors")}
    versions: dict[str, dict] = {}
    result = {
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions,
        "left_out": [name for name in TOOLS[1:] if name not in args.peer],
        "text": measured.corpus.name,
        "tokens": measured.corpus.scored,
        "sequence_length": measured.corpus.sequence_length,
        "bos": measured.corpus.bos,
        "calibration": {"text": corpus.name, "tokens": sum(map(len, windows)), "sequence_length": short},
        "group_size": args.group_size,
        "linears": len(linears),
        "unquantized_perplexity": float(f"{measured.perplexity:.6g}"),
        "rows": [],
    }
    for name, row_name, arguments, peer in _asked(args, log, versions):
        row = {"tool": name, "row": row_name} | peer.ask(job | {"arguments": arguments})
        if "error" not in row:
            row |= measured.compare(load_file(weights))
        console.out(json.dumps(row))
        result["rows"].append(row)
        yield result


def _asked(args: argparse.Namespace, log, versions: dict) -> Iterator[tuple[str, str, dict, Peer]]:
    """(tool, row, arguments, peer) of all rows to measure. Notes the versions of each tool."""
    for name, python in {"qcli": sys.executable, **args.peer}.items():
        known = rows_of(name, args.group_size)
        rows = [row for row in known if any(re.search(pattern, f"{name}: {row[0]}") for pattern in args.only)]
        if rows:
            peer = Peer(name, python, log)
            versions[name] = peer.versions
            yield from ((name, *row, peer) for row in rows if "error" not in peer.versions)
            peer.close()


def added(model: str, result: dict) -> dict:
    """The saved result for a model with the rows of another one added. Exits where the two were not measured alike."""
    path = result_path("peers", model)
    if not path.exists():
        return result
    saved = json.loads(path.read_text())
    for field in ("text", "tokens", "sequence_length", "bos", "calibration", "group_size", "linears"):
        if saved[field] != result[field]:
            raise SystemExit(f"{path.name}: {field} is {saved[field]}, expected {result[field]}; measure it again without --add")
    cpu = result["machine"]["cpu"]
    elsewhere = {} if cpu == saved["machine"]["cpu"] else {"cpu": cpu}  # where the seconds of a row were taken
    new = {(row["tool"], row["row"]) for row in result["rows"]}
    kept = [row for row in saved["rows"] if (row["tool"], row["row"]) not in new]
    left_out = [name for name in saved["left_out"] if name not in result["versions"]]
    rows = sorted([*kept, *(row | elsewhere for row in result["rows"])], key=lambda row: order(row, saved["group_size"]))
    return saved | {"versions": saved["versions"] | result["versions"], "left_out": left_out, "rows": rows}


def show(model: str, result: dict) -> None:
    """Prints the rows by bits of a weight."""
    done = sorted((row for row in result["rows"] if "error" not in row), key=lambda row: (round(row["bits_per_weight"]), row["kl"]))
    console.table(
        f"{model}: perplexity {result['unquantized_perplexity']:,} on {result['tokens']:,} tokens",
        ("tool", "row", "bits", "KL", "±", "perplexity", "same top-1", "seconds", "CPU seconds", "peak"),
        [
            (
                row["tool"],
                row["row"],
                f"{row['bits_per_weight']:.3f}",
                f"{row['kl']:.4g}",
                f"{row['kl_error']:.1g}",
                f"{row['perplexity']:,.2f}",
                f"{row['same_top1']:.1%}",
                f"{row['seconds']:.1f}",
                f"{row['cpu_seconds']:.1f}",
                f"{row['peak_bytes'] / 1e9:.2f} GB",
            )
            for row in done
        ],
        left=(0, 1),
    )
    for row in result["rows"]:
        if "error" in row:
            console.out(f"{row['tool']}, {row['row']}: {row['error']}")
    if result["left_out"]:
        console.out(f"left out, no environment: {', '.join(result['left_out'])}")


def _peer(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in TOOLS[1:] or not python:
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=PYTHON with NAME one of {', '.join(TOOLS[1:])}")
    return name, python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--peer", action="append", default=[], type=_peer, metavar="NAME=PYTHON")
    parser.add_argument("--text", help="a text to measure on; by default the bundled one")
    parser.add_argument("--calibration", help="a text to calibrate on; by default the second half of that text")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, at most")
    parser.add_argument("--calibration-tokens", type=int, default=16_384, help="of the text to calibrate on, at most")
    parser.add_argument("--group-size", type=int, default=64, help="of the rows that have groups; 64 by default")
    only = {"action": "append", "metavar": "PATTERN"}
    parser.add_argument("--only", **only, help="rows with one of these in 'TOOL: ROW'; not saved without --add")
    parser.add_argument("--add", action="store_true", help="add to the rows that are saved, if they were measured so")
    args = parser.parse_args()
    args.peer, save_all = dict(args.peer), args.add or not args.only
    args.only = args.only or [""]
    (ROOT / "build").mkdir(exist_ok=True)
    for model in args.models or (str(ROOT / "examples" / "demo-model"),):
        name = Path(model).name
        with tempfile.TemporaryDirectory() as folder, open(ROOT / "build/peers.log", "w") as log:
            for found in measure(model, args, Path(folder), log):
                result = added(name, found) if args.add else found
                if save_all:
                    save("peers", name, result)
        show(name, result)


if __name__ == "__main__":
    main()
