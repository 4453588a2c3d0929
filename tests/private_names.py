"""What qcli takes from other libraries beyond their documented names: the one list of it.

Such a name may move with any release. Each entry says where the name lies, which files of qcli/ use it, and which test fails when
it is gone or means something else. tests/test_private_names.py holds the list to the source and to the installed libraries.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Private:
    """`name` as an import path, "library: attribute" for what only instances have; `why` qcli needs it."""

    name: str
    files: tuple[str, ...]
    noticed_by: str
    why: str


_STREAMING = "tests/streaming/test_streaming.py::test_logits_are_those_of_the_whole_model"
_OLD_NAMES = "tests/streaming/test_streaming.py::test_old_names_and_shards"
_LOADING = "tests/commands/test_generate.py::test_quantizing_while_reading_equals_quantizing_first"
_LINEARS = "tests/formats/test_architectures.py::test_reloads_in_transformers_and_bitsandbytes"
_CAPTURED = "tests/generation/test_decode_graph.py::test_a_replayed_step_says_what_transformers_says"
_KINDS = "tests/generation/test_decode_graph.py::test_models_that_cannot_be_captured_are_known_beforehand"
_SEEN = "tests/test_private_names.py::test_torch_tells_who_watches_a_call"
_FLOAT32 = "tests/formats/test_architectures.py::test_float16_keeps_float32_where_transformers_does"
_REPLACED = "tests/nn/test_nn.py::test_tensors_that_are_replaced_or_changed_are_noticed"
_INT8_CACHE = "tests/evaluation/test_evaluate.py::test_an_int8_cache_is_compared_with_the_model"
_TIED = "tests/loading/test_head.py::test_a_model_with_a_quantized_head_computes_what_is_stored"
_READ = "tests/generation/test_lean.py::test_a_model_that_computes_something_else_is_found_out"
_LOADER = "transformers.core_model_loading"
_ADAPTERS = "tests/finetuning/test_gradients.py::test_float32_gradients_are_those_of_bitsandbytes_to_the_bit"

PRIVATE = (
    Private(
        f"{_LOADER}.convert_and_load_state_dict_in_model",
        ("streaming/skeleton.py",),
        _STREAMING,
        "loads a unit's tensors as transformers does",
    ),
    Private("transformers.modeling_utils.LoadStateDictConfig", ("streaming/skeleton.py",), _STREAMING, "the settings of that"),
    Private("transformers.initialization.no_init_weights", ("streaming/skeleton.py",), _STREAMING, "builds no weights"),
    Private("transformers.PreTrainedModel._from_config", ("streaming/skeleton.py",), _STREAMING, "builds a given class"),
    Private("transformers.PreTrainedModel._get_dtype_plan", ("streaming/skeleton.py",), _STREAMING, "what stays float32"),
    Private(
        "transformers.conversion_mapping.get_model_conversion_mapping",
        ("checkpoint/modules.py", "streaming/skeleton.py"),
        _OLD_NAMES,
        "which stored names become which parameters",
    ),
    Private(f"{_LOADER}.rename_source_key", ("checkpoint/modules.py", "streaming/skeleton.py"), _OLD_NAMES, "applies them"),
    Private(
        f"{_LOADER}.WeightRenaming",
        ("checkpoint/modules.py", "loading/transformers_quantizer.py", "streaming/skeleton.py"),
        _OLD_NAMES,
        "one such rule; ours for the companions of 4-bit weights",
    ),
    Private(
        "transformers.quantizers.HfQuantizer",
        ("loading/transformers_format.py", "loading/transformers_quantizer.py"),
        _LOADING,
        "the base of our quantizer",
    ),
    Private(
        "transformers.PretrainedConfig: _commit_hash",
        ("loading/transformers_format.py",),
        "tests/loading/test_transformers_format.py::test_in_any_order_of_imports",
        "which revision of a repository from_pretrained has fetched",
    ),
    Private("peft.LoraConfig._register_custom_module", ("finetuning/lora.py",), _ADAPTERS, "puts our adapters on our modules"),
    Private(
        "peft.tuners.lora.layer.LoraLayer._move_adapter_to_device_of_base_layer",
        ("finetuning/lora.py",),
        "tests/finetuning/test_schemes.py::test_gradients_are_those_on_the_dequantized_weights",
        "would give adapters the dtype of an 8-bit weight",
    ),
    Private(
        "transformers.quantizers.HfQuantizer._process_model_before_weight_loading",
        ("loading/transformers_quantizer.py",),
        _LOADING,
        "the hook in which our modules take the place of linear ones",
    ),
    Private(
        "transformers.quantizers.HfQuantizer._process_model_after_weight_loading",
        ("loading/transformers_quantizer.py",),
        "tests/formats/test_foreign.py::test_decodes_as_its_writer",
        "and that in which they lay their tensors out",
    ),
    Private(
        "transformers.quantizers.HfQuantizer._dequantize",
        ("loading/transformers_quantizer.py",),
        "tests/loading/test_dequantizing.py::test_it_is_the_plain_model_of_the_same_weights",
        "what its model.dequantize() calls",
    ),
    Private(
        "transformers.quantizers.register_quantizer",
        ("loading/transformers_format.py", "loading/transformers_quantizer.py"),
        _LOADING,
        "makes it known",
    ),
    Private(
        "transformers.quantizers.register_quantization_config",
        ("loading/transformers_format.py", "loading/transformers_quantizer.py"),
        _LOADING,
        "and its config",
    ),
    Private(
        "transformers.utils.quantization_config.QuantizationConfigMixin",
        ("loading/transformers_format.py", "loading/transformers_quantizer.py"),
        _LOADING,
        "that config's base",
    ),
    Private(
        "transformers.quantizers.base.get_keys_to_not_convert",
        ("checkpoint/modules.py",),
        _LINEARS,
        "which modules transformers leaves in 16 bits",
    ),
    Private(
        "transformers.PreTrainedModel._keep_in_fp32_modules",
        ("checkpoint/modules.py", "loading/transformers_quantizer.py"),
        _FLOAT32,
        "which modules stay float32 where the rest is float16",
    ),
    Private(
        "transformers.PreTrainedModel._keep_in_fp32_modules_strict",
        ("checkpoint/modules.py",),
        _FLOAT32,
        "and where it is bfloat16",
    ),
    Private(
        "transformers.PreTrainedModel._keys_to_ignore_on_load_missing",
        ("checkpoint/modules.py",),
        _LINEARS,
        "which parameters a checkpoint may lack",
    ),
    Private(
        "transformers.dynamic_module_utils.get_class_from_dynamic_module",
        ("checkpoint/modules.py",),
        "tests/test_private_names.py::test_a_class_of_the_models_own_code_is_found",
        "the class of remote code",
    ),
    Private(
        "transformers.cache_utils.DynamicSlidingWindowLayer",
        ("generation/graph.py", "generation/recognized.py"),
        _KINDS,
        "a layer that a step knows, and its window",
    ),
    Private(
        "transformers.generation.configuration_utils.GenerationMode",
        ("generation/graph.py", "generation/lean.py"),
        "tests/generation/test_decode_graph.py::test_rules_that_look_at_the_text_are_left_to_transformers",
        "whether it is greedy or sampled",
    ),
    Private("transformers.PreTrainedModel._can_compile_fullgraph", ("generation/graph.py",), _KINDS, "fit for a static cache"),
    Private(
        "transformers.PreTrainedConfig._attn_implementation",
        ("generation/graph.py", "generation/structure.py", "evaluation/int8_cache.py"),
        _CAPTURED,
        "what attention it has",
    ),
    Private(
        "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", ("evaluation/int8_cache.py",), _INT8_CACHE, "the attention it has"
    ),
    Private(
        "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS",
        ("evaluation/int8_cache.py",),
        _INT8_CACHE,
        "the masks of that attention",
    ),
    Private(
        "torch.nn.Module: _forward_hooks",
        ("generation/linears.py", "nn/low_rank.py"),
        _READ,
        "what changes the output of a linear layer; which of it an adapter is",
    ),
    Private("torch.nn.Module: _forward_pre_hooks", ("generation/linears.py",), _READ, "what changes its input"),
    Private(
        "torch._subclasses.fake_tensor.FakeTensorMode",
        ("checkpoint/torch_file.py",),
        "tests/formats/test_bitsandbytes.py::test_bin_checkpoints",
        "reads where a pickle's tensors lie, and no data",
    ),
    Private(
        "torch.UntypedStorage: _checkpoint_offset",
        ("checkpoint/torch_file.py",),
        "tests/formats/test_bitsandbytes.py::test_bin_checkpoints",
        "the place that this notes",
    ),
    Private(
        "torch._int_mm",
        ("ops/linear_int8.py",),
        "tests/ops/test_linear_int8.py::test_the_integer_product_is_exact",
        "the product of int8 matrices",
    ),
    Private(
        "torch.nn.Module._apply",
        ("nn/_fast_path.py",),
        "tests/nn/test_nn.py::test_copies_and_moves_start_afresh",
        "moves of a module",
    ),
    Private("torch.nn.Module: _parameters", ("nn/_fast_path.py",), _REPLACED, "a module's own tensors, sooner"),
    Private("torch.nn.Module: _buffers", ("nn/_fast_path.py",), _REPLACED, "likewise"),
    Private("torch.nn.Module: _parameters", ("nn/quantized_embedding.py",), _TIED, "tensors that an embedding has with its weight"),
    Private(
        "torch.nn.Module: _buffers",
        ("nn/quantized_embedding.py", "loading/transformers_quantizer.py"),
        _TIED,
        "likewise, and those that are tied",
    ),
    Private(
        "transformers.PreTrainedModel: all_tied_weights_keys",
        ("checkpoint/modules.py", "loading/transformers_quantizer.py", "streaming/skeleton.py"),
        _TIED,
        "which parameters are one",
    ),
    Private("torch.nn.Module: _parameters", ("nn/quantized_linear.py",), _REPLACED, "what a step reads, without a look-up"),
    Private("torch.nn.Module: _buffers", ("nn/quantized_linear.py",), _REPLACED, "likewise"),
    Private("torch.nn.Module: _non_persistent_buffers_set", ("streaming/units.py",), _STREAMING, "buffers that no file holds"),
    Private("torch._C._len_torch_dispatch_stack", ("runtime/cpu.py",), _SEEN, "whether a mode sees the call"),
    Private("torch._C._len_torch_function_stack", ("runtime/cpu.py",), _SEEN, "likewise"),
    Private("torch._C._functorch.peek_interpreter_stack", ("runtime/cpu.py",), _SEEN, "whether a transform does"),
    Private(
        "torch._C._autograd._profiler_enabled",
        ("runtime/cpu.py",),
        "tests/nn/test_nn.py::test_transforms_and_modes_see_the_op",
        "whether a profiler does",
    ),
    Private(
        "torch._C: _cuda_getCurrentRawStream",
        ("runtime/cuda.py",),
        "tests/runtime/test_cuda.py::test_torch_without_the_quick_question_for_its_stream",
        "the stream, sooner",
    ),
    Private(
        "pycuda.driver.Function: _launch_kernel",
        ("runtime/cuda.py",),
        "tests/runtime/test_cuda.py::test_a_launch",
        "a launch without a copy of its arguments",
    ),
)
