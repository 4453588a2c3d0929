"""Stand-ins for a CUDA graph that run on a CPU, and two ways to continue a prompt: transformers' and ours."""

import torch
import transformers as t
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from qcli.generation import graph as decode_graph
from tests.models import ARCHITECTURES

aten = torch.ops.aten
WAITS = {aten.item, aten.is_nonzero, aten._local_scalar_dense, aten.nonzero, aten.masked_select}  # for the host


def call_it(rehearse, step):
    rehearse()
    return step


class Tape(TorchDispatchMode):
    """Records the ops of a step with the numbers in them, as a graph does, and does them again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        # lift_fresh makes a tensor of a number of Python's; of a bool it is `mask[...] = 0`, a mere fill on CUDA.
        if op.overloadpacket in WAITS or (op is aten.lift_fresh.default and args[0].dtype != torch.bool):
            raise RuntimeError(f"{op} would wait for the host")
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, result))
        return result

    def replay(self):
        made = {}  # what stands now for each result of the recording

        def now(tensor):
            return made.get(id(tensor), tensor)

        for op, args, kwargs, recorded in self.calls:
            args, kwargs = tree_map_only(torch.Tensor, now, (args, kwargs))
            result = op(*args, **kwargs)
            before = recorded if isinstance(recorded, (tuple, list)) else [recorded]
            after = result if isinstance(result, (tuple, list)) else [result]
            made.update({id(b): a for b, a in zip(before, after) if isinstance(b, torch.Tensor)})


def record_it(rehearse, step):
    rehearse()
    with Tape() as tape:
        step()
    return tape.replay


def small(name, **changes):
    """A model in float32, where no two sums of another order give another token."""
    torch.manual_seed(0)
    model_class, config, _ = ARCHITECTURES[name]
    config = config()
    config.update(changes)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        for module in model.base_model.modules():
            if isinstance(module, (torch.nn.Linear, t.pytorch_utils.Conv1D)):
                module.weight *= 6  # as they come, attention hardly moves what is said
    return model


def theirs(model, prompt, **options):
    ids = torch.tensor([prompt], device=model.device)
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def ours(model, prompt, capture, **options):
    heard = []

    def hear(token):
        heard.append(token)
        ends = options.get("eos_token_id") or []
        return token in ends

    torch.manual_seed(7)
    with torch.inference_mode():
        ids = torch.tensor([prompt], device=model.device)
        decode_graph.generate(model, ids, capture, hear, lambda: None, **options)
    return heard


GREEDY = {"do_sample": False, "repetition_penalty": 1.3}  # without the penalty random models say one word
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.001}
WINDOW = {"sliding_window": 8}
CASES = {
    "llama": {},
    "gpt2": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "phi3": {},
    "gpt_neox": {},
    "stablelm": {},
    "olmo2": {},
    "cohere": {},
    "starcoder2": WINDOW,
}
