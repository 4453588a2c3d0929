"""Generates greedily with vLLM on a CPU, for vllm_formats.py. Runs in vLLM's environment, which has no qcli.

    python vllm_run.py JOBS RESULTS

JOBS is a JSON list of {"folder", "prompts" (lists of token ids), "new_tokens", "environment", "seconds"}. RESULTS gets one JSON
line for each job: {"seconds", and "tokens" and "logprobs" of each prompt, or "error" (its beginning)}. vLLM is imported once, and
each job is a fork: one that crashes or exceeds its seconds costs that job alone. The first line has the versions of PACKAGES.
"""

import importlib
import json
import multiprocessing
import os
import sys
import time
from importlib.metadata import version

# One process, one thread, no network. vLLM reads these while it is imported, and when an engine is made.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
PACKAGES = ("vllm-cpu", "torch", "transformers", "compressed-tensors", "bitsandbytes", "vllm-bnb-plugin")


def import_all() -> None:
    """Imports, once for all forks, what an engine would import."""
    for module in ("models.qwen3", "layers.quantization.compressed_tensors.compressed_tensors"):
        importlib.import_module(f"vllm.model_executor.{module}")
    for module in ("vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "vllm.entrypoints.llm"):
        importlib.import_module(module)


def generate(job: dict) -> dict:
    """The greedy tokens after each prompt, and the log-probability of each."""
    from vllm import LLM, SamplingParams

    model = LLM(job["folder"], skip_tokenizer_init=True, enforce_eager=True, max_model_len=256, max_num_seqs=4, seed=0)
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, logprobs=0, detokenize=False)
    outputs = [each.outputs[0] for each in model.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling)]
    return {
        "tokens": [list(found.token_ids) for found in outputs],
        "logprobs": [[at[token].logprob for token, at in zip(found.token_ids, found.logprobs)] for found in outputs],
    }


def _in_child(job: dict, sender) -> None:
    os.environ |= job["environment"]
    try:
        found = generate(job)
    except Exception as e:
        found = {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:400]}"}
    sender.send(found)


def run(job: dict) -> dict:
    """What `generate` gives in a process of its own, or how that ended."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_in_child, args=(job, sender))
    started = time.monotonic()
    child.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(job["seconds"]) else {"error": f"no output in {job['seconds']} s"}
    except EOFError:
        child.join()
        found = {"error": f"the process ended with {child.exitcode}"}
    child.kill()
    child.join()
    return found | {"seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    """Command line."""
    jobs, results = sys.argv[1:]
    import_all()

    with open(jobs) as file, open(results, "w") as out:
        print(json.dumps({package: version(package) for package in PACKAGES}), file=out, flush=True)
        for job in json.load(file):
            print(json.dumps(run(job)), file=out, flush=True)


if __name__ == "__main__":
    main()
