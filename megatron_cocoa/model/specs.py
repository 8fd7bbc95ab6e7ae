"""Layer specs: which linear, norm and attention modules Megatron-Core builds.

``local`` needs torch and Megatron-Core alone and runs on CPU; ``transformer_engine`` brings fused norms and FP8.
Both give the same names in a distributed checkpoint, so a run may change between them at any stage.
"""

from __future__ import annotations

import functools

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor
from torch.nn import functional

from megatron_cocoa.config import ModelSettings, RecomputeSettings, TrainSettings
from megatron_cocoa.model.activations import SwiGLU
from megatron_cocoa.model.attention import SegmentAttention
from megatron_cocoa.model.compiled import compiled_on_gpu
from megatron_cocoa.model.fp8 import check_capability
from megatron_cocoa.model.layer import ReadRowsLayer
from megatron_cocoa.model.norms import Norm
from megatron_cocoa.model.remade import RemadeColumnParallelLinear, RemadeRowParallelLinear
from megatron_cocoa.model.self_attention import SegmentSelfAttention
from megatron_cocoa.parallel import device


class LocalProvider(LocalSpecProvider):
    """Megatron-Core's own linears with this project's norm, activation and attention.

    Args:
        attention_backend: of core attention.
        layer_arguments: keyword arguments of every ``ReadRowsLayer``.
    """

    def __init__(self, attention_backend: str, layer_arguments: dict[str, object]):
        self.attention_backend, self.layer_arguments = attention_backend, layer_arguments

    def column_parallel_linear(self) -> type:
        return RemadeColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RemadeRowParallelLinear

    def layer_norm(self, *args, **kwargs) -> type:
        return Norm

    def core_attention(self):
        return functools.partial(SegmentAttention, backend=self.attention_backend)

    def activation_func(self) -> type:
        return SwiGLU


def transformer_engine_provider(
    attention_backend: str, layer_arguments: dict[str, object], *, fuse_norms: bool
) -> BackendSpecProvider:
    """Transformer Engine's linears and norms with this project's attention; arguments as of ``LocalProvider``.

    ``fuse_norms``: compute a norm inside the projection that follows it.
    """
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    class TransformerEngineProvider(TESpecProvider):
        def column_parallel_linear(self) -> type:
            return adding_its_bias(super().column_parallel_linear())

        def column_parallel_layer_norm_linear(self) -> type:
            return adding_its_bias(super().column_parallel_layer_norm_linear())

        def row_parallel_linear(self) -> type:
            return adding_its_bias_alone(super().row_parallel_linear())

        def core_attention(self):
            return functools.partial(SegmentAttention, backend=attention_backend)

        def activation_func(self) -> type:
            return SwiGLU

        def fuse_layernorm_and_linear(self) -> bool:
            return fuse_norms

    provider = TransformerEngineProvider()
    provider.layer_arguments = layer_arguments
    return provider


@functools.cache
def adding_its_bias(linear: type) -> type:
    """``linear``, one of Megatron's column-parallel classes, that leaves no bias to its caller.

    Megatron's MLP asks for the bias of its first projection and adds it to the whole result; inside of the product,
    the bias costs no pass over memory, and Transformer Engine sums its gradient there as well.
    """

    class AddsItsBias(linear):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **{**kwargs, "skip_bias_add": False})

    return AddsItsBias


@functools.cache
def adding_its_bias_alone(linear: type) -> type:
    """``linear``, Transformer Engine's row-parallel class, that leaves no bias to its caller on a single rank.

    Over several ranks a bias must follow their sum, and is added together with the residual. On one the product adds
    it: the kernel for both, small as it is, took a tenth of the host's time in a step of the 3B.
    """

    class AddsItsBiasAlone(linear):
        def __init__(self, *args, config: TransformerConfig, skip_bias_add: bool, **kwargs) -> None:
            alone = config.tensor_model_parallel_size == 1
            super().__init__(*args, config=config, skip_bias_add=skip_bias_add and not alone, **kwargs)
            if alone:
                # It is prepared for a sum over ranks, and would add the bias in a pass of its own.
                self.gemm_bias_unfused_add = False

    return AddsItsBiasAlone


def resolve_implementation(settings: ModelSettings) -> str:
    """``local`` or ``transformer_engine``, with ``auto`` decided by what is present.

    Raises:
        ValueError: if Transformer Engine is asked for and cannot serve here.
    """
    installed = device.is_installed("transformer_engine")
    usable = installed and device.has_gpu()
    if settings.transformer_impl == "transformer_engine" and not usable:
        missing = "a GPU" if installed else "transformer-engine (pip install --no-build-isolation -e '.[te]')"
        raise ValueError(f"transformer_impl transformer_engine needs {missing}; choose local")
    if settings.fp8 and not usable:
        raise ValueError("fp8 needs Transformer Engine and a GPU that has it; set model.fp8 to null")
    if settings.fp8:
        check_capability(settings.fp8, device.compute_capability())
    if settings.transformer_impl == "auto":
        return "transformer_engine" if usable else "local"
    return settings.transformer_impl


def repeats_whole_mlps(settings: TrainSettings) -> bool:
    """Whether recompute of MLPs repeats the whole MLP, as Megatron does, or only its first projection."""
    return settings.adapter.is_used or resolve_implementation(settings.model) == "transformer_engine"


def build_provider(
    settings: ModelSettings,
    *,
    recompute: RecomputeSettings = RecomputeSettings(),
    is_adapted: bool = False,
    tower: bool = False,
) -> BackendSpecProvider:
    """The provider of a run's settings.

    Args:
        settings: of the model.
        recompute: how many layers recompute their MLP, where the config asks for that.
        is_adapted: adapters will be put beside the projections. They need the projection's input, which a norm fused
            into it would hide, and change its output.
        tower: for the tower, which may have an attention backend of its own.

    Raises:
        ValueError: as ``resolve_implementation``.
    """
    backend, recomputed = settings.attention_backend, recompute.language_num_layers
    if tower:
        backend, recomputed = settings.vision_attention_backend or backend, recompute.vision_num_layers
    arguments = dict(recomputed_layers=recomputed, is_adapted=is_adapted)
    if resolve_implementation(settings) == "transformer_engine":
        return transformer_engine_provider(backend, arguments, fuse_norms=not is_adapted)
    return LocalProvider(backend, arguments)


def get_bias_dropout_add(training: bool, fused: bool):
    """Megatron's function of this name with one intermediate tensor fewer: adds bias and residual to a projection.

    The bias is added first, as in Megatron and Hugging Face: in BF16 the sum with the projection rounds less than one
    with the residual would.
    """

    def bias_dropout_add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        x, bias = x_with_bias
        if prob > 0.0 and training:
            x = functional.dropout(x if bias is None else x + bias, prob)
            return x + residual
        return x + residual if bias is None else _add_both(x, bias, residual)

    return bias_dropout_add


@compiled_on_gpu
def _add_both(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return (x + bias).add_(residual)


def block_spec(provider: BackendSpecProvider, config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """Spec of a block of ``num_layers`` pre-norm layers.

    Args:
        provider: local or Transformer Engine modules.
        config: the block's config (its normalization picks the norm).
        num_layers: layers on this pipeline stage and virtual chunk.
    """
    rms = config.normalization == "RMSNorm"
    norm = provider.layer_norm(rms_norm=rms, for_qk=False)
    fused = provider.fuse_layernorm_and_linear()
    linear_qkv = provider.column_parallel_layer_norm_linear() if fused else provider.column_parallel_linear()
    layer = ModuleSpec(
        module=ReadRowsLayer,
        params=provider.layer_arguments,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=ModuleSpec(
                module=SegmentSelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear_qkv,
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if fused else norm,
            mlp=get_mlp_module_spec_for_backend(backend=provider, use_te_activation_func=config.use_te_activation_func),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def projection_spec(provider: BackendSpecProvider) -> MLPSubmodules:
    """Spec of the merger's MLP: its norm stands before the merge, so its first linear has none fused."""
    return MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear())
