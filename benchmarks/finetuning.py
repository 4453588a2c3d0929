"""A step of `qcli finetune` beside PEFT on transformers and bitsandbytes, on one checkpoint, in one run.

    python benchmarks/finetuning.py [--folder FOLDER] [--rounds N] [--shape NAME] [--model FOLDER]

The model is a Llama with random weights (103M in its linear layers), in NF4 with double quantization, and one that --model names.
Adapters have rank 16 and are on all linear layers. A step is a row of 512 tokens, or of 64, all of which are learnt: forward,
backward, clipping and AdamW. PEFT runs as its documentation has it, in bfloat16 with float32 adapters, with
prepare_model_for_kbit_training ("prepared") and without. Each contender runs in a process of its own, on one thread, in turn with
the others. Seconds are the processor's, the median of the steps; of the rounds the least. Memory is what the process's high-water
mark rises by from its imports to the end of its steps, weights included. Prints a table and writes
benchmarks/results/finetuning-NAME.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from make_checkpoint import make_checkpoint  # noqa: E402
from measure import machine  # noqa: E402
from rows import Row, save, show  # noqa: E402

import qcli  # noqa: E402
from qcli import console  # noqa: E402

SHAPES = {"103M": {"layers": 8, "hidden": 1024, "intermediate": 2816, "vocabulary": 8192, "heads": 16, "kv_heads": 8}}
TOKENS = (512, 64)
RANK, STEPS = 16, {512: 5, 64: 20}
CONTENDERS = ("qcli", "peft", "peft, prepared")


def main() -> None:
    """Runs all contenders in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a quantized checkpoint to measure, too")
    parser.add_argument("--child", nargs=3, metavar=("CONTENDER", "FOLDER", "TOKENS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        contender, folder, tokens = given.child
        print(json.dumps(measure(contender, folder, int(tokens))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        models = {name: made(folder, name) for name in SHAPES} | ({given.model.name: given.model} if given.model else {})
        rows = [row for name, path in models.items() for tokens in TOKENS for row in compared(name, path, tokens, given.rounds)]
    show(rows, "a step: CPU seconds, MB of memory")
    result = {
        "machine": machine("peft", "transformers") | {"threads": 1},
        "rounds": given.rounds,
        "rows": [vars(row) for row in rows],
    }
    console.say(f"wrote {save('finetuning', result['machine']['cpu'], result)}")


def made(folder: Path, name: str) -> Path:
    """The NF4 checkpoint of a shape."""
    plain, quantized = folder / name, folder / f"{name}-nf4"
    if not quantized.exists():
        make_checkpoint(plain, **SHAPES[name], shard_size=5 * 10**9)
        qcli.quantize(str(plain), str(quantized), bits=4)
    return quantized


def compared(name: str, model: Path, tokens: int, rounds: int) -> list[Row]:
    """One row for a length: the least of the rounds for each contender."""
    found: dict[str, list[dict]] = {contender: [] for contender in CONTENDERS}
    for _ in range(rounds):
        for contender in CONTENDERS:
            command = [sys.executable, __file__, "--child", contender, str(model), str(tokens)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            found[contender].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {contender: min(one["seconds"] for one in runs) for contender, runs in found.items()}
    memory = {contender: statistics.median(one["memory"] for one in runs) / 1e6 for contender, runs in found.items()}
    figures = {f"{contender} s": value for contender, value in seconds.items()}
    row = Row(f"{name}, {tokens} tokens", figures | {f"{contender} MB": value for contender, value in memory.items()})
    row.compare("time, of PEFT's", seconds["qcli"] / seconds["peft"], 1.0 if tokens == 512 else 0.9, 0.8, at_most=True)
    row.compare("memory, of PEFT's", memory["qcli"] / memory["peft"], 1.0, at_most=True)
    return [row]


def measure(contender: str, folder: str, tokens: int) -> dict[str, float]:
    """CPU seconds of a step and bytes of memory, in this process."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch

    import qcli.finetuning.run  # noqa: F401

    torch.set_num_threads(1)
    before = _now()
    step = qclis_step(folder, tokens) if contender == "qcli" else pefts_step(folder, tokens, contender != "peft")
    step()
    times = []
    for _ in range(STEPS[tokens]):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return {"seconds": statistics.median(times), "memory": _peak() - before}


def qclis_step(folder: str, tokens: int):
    """A step of qcli's own loop."""
    import numpy as np
    import torch

    from qcli.finetuning import lora
    from qcli.finetuning.encoding import Row as Example
    from qcli.finetuning.loss import Loss
    from qcli.finetuning.ranks import Ranks
    from qcli.finetuning.settings import Options
    from qcli.finetuning.training import Trainer

    model, _ = qcli.load(folder, device="cpu")
    lora.attach(model, lora.linear_modules(model), RANK, 32, 0.0, False, 0)
    loss = Loss(model, torch.device("cpu"), folder, checkpointing=False)
    trainer = Trainer(model, loss, lora.adapter_parameters(model), Options(), False, Ranks())
    row = Example(_ids(tokens).numpy().astype(np.int32), np.arange(tokens) > 0, "")
    return lambda: trainer.step([row], 1e-4, 0)


def pefts_step(folder: str, tokens: int, prepared: bool):
    """A step as PEFT's documentation has it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its layout has no gradient after an evaluation
            module.support_avx512bf16_for_cpu = False
    if prepared:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, ids = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0), _ids(tokens)[None]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def _ids(tokens: int):
    import torch

    return torch.randint(5, 700, (tokens,), generator=torch.Generator().manual_seed(0))


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _now() -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


if __name__ == "__main__":
    main()
