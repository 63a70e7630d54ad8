"""Step-1: the pre-norm decoder of Step-Audio, one class for every size.

h += Attention(RMS(h)); h += SwiGLU(RMS(h)); a final RMS; an untied head. No biases, no dropout, no
rotary or learned positions: the only position signal is square-root ALiBi. Sizes: config.json of
stepfun-ai/Step-Audio-Chat (the defaults here) and Step-Audio-TTS-3B; equations: modeling_step1.py
there and vLLM's step1.py.

With rotary positions, biases of query, key and value, norms of query and key and a tied head as
options the same class is Llama, Qwen2 and Qwen3 (modeling_{llama,qwen2,qwen3}.py of transformers).

Choices:
- Query, key, value, gate and up are products of their own: joint ones were no faster, and their
  gradients have to be put together again in memory.
- Layers are stacked on a leading axis and scanned; decoding_weights.py takes them apart, where
  slicing the stack would copy every weight at every token.
- One code path: training, prefill and one-token steps differ only in the cache they pass. Keys are
  masked by segment and position, so packed rows, padding and the unused tail of a cache need no
  case of their own.
- Soft tokens, a frozen encoder's embeddings of an image, take the place of rows of the table
  through one learnt matrix (LLaVA, arXiv 2304.08485, section 4.1). The encoder runs elsewhere.
- Outputs into the residual stream start smaller by sqrt(2 num_layers) (GPT-2); the published start
  is unknown.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.backbone import context_parallel, kv_cache, remat, rope
from t5x_audio.backbone.alibi import alibi_slopes, interpolate_slopes
from t5x_audio.backbone.attention import attention
from t5x_audio.backbone.feed_forward import dense, swiglu
from t5x_audio.backbone.integer_product import Integers, integer_product
from t5x_audio.backbone.kv_cache import KVCache
from t5x_audio.backbone.mesh import (
    BATCH_AXES,
    FSDP_AXIS,
    HEAD_AXIS,
    SEQUENCE_AXIS,
    STREAM_AXES,
    constrain,
)
from t5x_audio.backbone.rope import Llama3Scaling
from t5x_audio.cpu_weights import ByOutput, dense_by_output
from t5x_audio.errors import UserError


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of Step-1; the defaults are the 130B's.

    Attributes:
      num_layers, embed, mlp: depth, width and inner width of the feed-forward.
      num_heads, num_kv_heads, head_dim: grouped-query attention; heads of a group are contiguous.
      vocab_size: rows of the embedding and columns of the head.
      rms_eps: added to the mean square.
      positions: 'alibi', the square-root bias, or 'rope'.
      alibi_slopes: one per head; None takes the slope rule.
      max_pos_interp_ratio: how many times longer than in training the context is; flattens slopes.
      rope_theta, rope_scaling: see rope.py.
      qkv_bias: biases in the projections to query, key and value (Qwen2).
      qk_norm: RMS norms of every query's and key's head_dim (Qwen3).
      tied_head: the head is the embedding; no weights of its own.
      init_std: standard deviation of every initial matrix.
      dtype: type of activations and matrix products, 'float32' or 'bfloat16'.
      remat: which activations the backward pass keeps, one of remat.POLICIES.
      scan_unroll: layers per iteration of the compiled loop; all of them is fastest for a small
        model, 1 compiles fastest for a deep one.
      attention_block: queries that meet their keys at once.
      soft_width: width of the embeddings that may stand for tokens; 0: none, and no weights.
    """

    num_layers: int = 88
    embed: int = 12288
    mlp: int = 31232
    num_heads: int = 96
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 74752
    rms_eps: float = 1e-5
    positions: str = "alibi"
    alibi_slopes: tuple[float, ...] | None = None
    max_pos_interp_ratio: float = 1.0
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    init_std: float = 0.02
    dtype: str = "bfloat16"
    remat: str = "full"
    scan_unroll: int = 1
    attention_block: int = 128
    soft_width: int = 0

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"TransformerConfig: num_heads={self.num_heads} is no multiple of "
                f"num_kv_heads={self.num_kv_heads}; change one of them"
            )
        if self.remat not in remat.POLICIES:
            names = ", ".join(remat.POLICIES)
            raise UserError(f"TransformerConfig: remat={self.remat!r} is none of {names}")
        if self.positions not in ("alibi", "rope"):
            raise UserError(
                f"TransformerConfig: positions={self.positions!r} is neither alibi nor rope"
            )
        if self.alibi_slopes is not None and len(self.alibi_slopes) != self.num_heads:
            raise UserError(
                f"TransformerConfig: {len(self.alibi_slopes)} alibi_slopes for "
                f"{self.num_heads} heads; give one per head"
            )
        if self.alibi_slopes is not None and min(self.alibi_slopes) <= 0:
            raise UserError("TransformerConfig: alibi_slopes must be above 0")
        if self.max_pos_interp_ratio < 1.0:
            raise UserError(
                f"TransformerConfig: max_pos_interp_ratio={self.max_pos_interp_ratio} is below 1"
            )

    @property
    def slopes(self) -> tuple[float, ...] | None:
        """The ALiBi slope of each head; None with other positions."""
        if self.positions != "alibi":
            return None
        slopes = tuple(self.alibi_slopes or alibi_slopes(self.num_heads))
        return interpolate_slopes(slopes, self.max_pos_interp_ratio)

    def make(self, rngs: nnx.Rngs) -> "Transformer":
        """Builds the model with fresh weights."""
        return Transformer(self, rngs)


def _param(rngs, shape, axes, std):
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), logical_axes=axes)


def _laid_out(x, cache):
    """The residual stream [B, S, embed] over the mesh, between two layers."""
    return constrain(x, BATCH_AXES, SEQUENCE_AXIS) if cache is None else constrain(x, STREAM_AXES)


def _served(x, module, name: str, dtype):
    """x [..., I] by a weight in a form of its own for decoding -> [..., O]; None if it has none.

    Sums are of `dtype`. See decoding_weights.py and `quantization/packed_model.py`.
    """
    weight = getattr(module, name)
    if isinstance(weight, Integers):
        return integer_product(x.astype(dtype), weight[...], getattr(module, f"{name}_scale")[...])
    if isinstance(weight, ByOutput):
        return dense_by_output(x, weight[...], dtype)
    if hasattr(weight, "times"):  # packed integers, which unpack themselves
        return weight.times(x.astype(dtype))
    return None


def _scaled(product, module, name: str):
    """`product` times the scales of the outputs, where the weight is int8 (decoding_weights.py)."""
    scale = getattr(module, f"{name}_scale", None)
    if scale is None or isinstance(getattr(module, name), Integers):
        return product
    return (product.astype(jnp.float32) * scale[...].reshape(-1)).astype(product.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale; the statistics in float32."""

    def __init__(self, dim: int, eps: float, axes: tuple):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), logical_axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dim] -> the same."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


class Layer(nnx.Module):
    """One decoder layer; `layers` prefixes the logical axes when layers are stacked."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, layers: tuple = ()):
        self.config = config
        embed, mlp, head_dim = config.embed, config.mlp, config.head_dim
        groups = config.num_kv_heads
        std, out_std = config.init_std, config.init_std * (2 * config.num_layers) ** -0.5
        self.attention_norm = RMSNorm(embed, config.rms_eps, (*layers, "embed"))
        self.mlp_norm = RMSNorm(embed, config.rms_eps, (*layers, "embed"))
        into_groups = (*layers, "embed", "kv_heads", "head_dim")
        self.query = _param(
            rngs, (embed, config.num_heads, head_dim), (*layers, "embed", "heads", "head_dim"), std
        )
        self.key = _param(rngs, (embed, groups, head_dim), into_groups, std)
        self.value = _param(rngs, (embed, groups, head_dim), into_groups, std)
        self.out = _param(
            rngs,
            (config.num_heads, head_dim, embed),
            (*layers, "heads", "head_dim", "embed"),
            out_std,
        )
        if config.qkv_bias:
            for name, heads in (("query", config.num_heads), ("key", groups), ("value", groups)):
                axes = (*layers, "heads" if name == "query" else "kv_heads", "head_dim")
                bias = nnx.Param(jnp.zeros((heads, head_dim), jnp.float32), logical_axes=axes)
                setattr(self, f"{name}_bias", bias)
        if config.qk_norm:
            self.query_norm = RMSNorm(head_dim, config.rms_eps, (*layers, "head_dim"))
            self.key_norm = RMSNorm(head_dim, config.rms_eps, (*layers, "head_dim"))
        self.gate = _param(rngs, (embed, mlp), (*layers, "embed", "mlp"), std)
        self.up = _param(rngs, (embed, mlp), (*layers, "embed", "mlp"), std)
        self.down = _param(rngs, (mlp, embed), (*layers, "mlp", "embed"), out_std)

    def __call__(self, x, place, rotation=None, cache=None):
        """One layer.

        Args:
          x: [B, S, embed].
          place: (positions, segment ids) int32[B, S] of the tokens.
          rotation: of `rope.rotation` at the positions; None with ALiBi.
          cache: None, or (keys, values, index, first slot, (positions, segment ids) of all slots):
            of this layer with index None, or of all layers and which one this is.

        Returns:
          ([B, S, embed], updated (keys, values) or None).
        """
        # Training gathers a weight over the devices that share the batch. A decoder leaves every
        # weight where it is stored: XLA moves the few tokens instead.
        into, out_of = (FSDP_AXIS, HEAD_AXIS), (HEAD_AXIS, FSDP_AXIS)
        if cache is not None:
            into = out_of = None
        attended, kept = self._attend(self.attention_norm(x), place, rotation, cache, into, out_of)
        x = remat.named(x + attended, "residual")
        normed = self.mlp_norm(x)
        gate = remat.named(self._product(normed, "gate", into), "gate")
        up = remat.named(self._product(normed, "up", into), "up")
        return x + self._product(swiglu(gate, up), "down", out_of), kept

    def _product(self, x, name: str, layout):
        """[..., I] -> [..., O] by the weight of that name."""
        product = _served(x, self, name, x.dtype)
        if product is None:
            product = dense(x, getattr(self, name)[...].reshape(x.shape[-1], -1), layout)
        return _scaled(product, self, name)

    def _project(self, x, name: str, layout):
        """[B, S, embed] -> [B, heads, S, head_dim] of query, key or value."""
        config = self.config
        projected = self._product(x, name, layout)
        projected = projected.reshape(*x.shape[:2], -1, config.head_dim)
        if config.qkv_bias:
            projected = projected + getattr(self, f"{name}_bias")[...].astype(x.dtype)
        return projected.swapaxes(1, 2)

    def _attend(self, x, place, rotation, cache, into, out_of):
        config = self.config
        batch, length, _ = x.shape
        query, key, value = (self._project(x, name, into) for name in ("query", "key", "value"))
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rope.rotate(query, rotation), rope.rotate(key, rotation)
        query = query.reshape(batch, config.num_kv_heads, -1, length, config.head_dim)
        kept, key_place = None, place
        if cache is not None:
            keys, values, index, slot, key_place = cache
            kept = tuple(
                kv_cache.written(slots, new, index, slot)
                for slots, new in ((keys, key), (values, value))
            )
            key, value = (kv_cache.read(slots, batch, index, x.dtype) for slots in kept)
        mixed = attention(
            query,
            key,
            value,
            place,
            key_place,
            slopes=config.slopes,
            block_size=config.attention_block,
            same_tokens=cache is None,
        )
        mixed = mixed.reshape(batch, config.num_heads, length, -1).swapaxes(1, 2)
        return self._product(mixed.reshape(batch, length, -1), "out", out_of), kept


class Transformer(nnx.Module):
    """Token ids in, logits out."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        """Builds the model with its layers stacked on axis 0."""
        self.config = config
        vocab, embed, std = config.vocab_size, config.embed, config.init_std
        self.embedding = _param(rngs, (vocab, embed), ("vocab", "embed"), std)
        if config.soft_width:
            # Embeddings of unit variance come out as large as a row of the table.
            soft_std = std * config.soft_width**-0.5
            shape = (config.soft_width, embed)
            self.soft_projector = _param(rngs, shape, (None, "embed"), soft_std)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(layer_rngs):
            return Layer(config, layer_rngs, layers=("layers",))

        self.layers = stack(rngs)
        self.final_norm = RMSNorm(embed, config.rms_eps, ("embed",))
        if not config.tied_head:
            self.head = _param(rngs, (embed, vocab), ("embed", "vocab"), std)

    def __call__(self, tokens, *, positions=None, segment_ids=None, cache=None):
        """Logits of the token after each.

        Args:
          tokens: int32[B, S].
          positions: int32[B, S] counted inside each segment; by default 0, 1, ... (behind the
            cache's filled slots).
          segment_ids: int32[B, S], 0 = padding; by default all 1.
          cache: of `init_cache`; the tokens are written to its next S slots.

        Returns:
          float32[B, S, vocab_size]; with a cache, (logits, the updated cache).
        """
        hidden, cache = self.hidden(tokens, positions, segment_ids, cache)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, cache)

    @property
    def head_kernel(self) -> jax.Array:
        """[embed, vocab_size], the columns of the head."""
        if self.config.tied_head:
            return self.embedding[...].T
        return self.head[...].T if isinstance(self.head, ByOutput) else self.head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., embed] of `hidden` -> float32[..., vocab_size]."""
        if self.config.tied_head:
            return dense_by_output(hidden, self.embedding[...], jnp.float32)
        logits = _served(hidden, self, "head", jnp.float32)
        if logits is None:
            kernel = self.head[...].astype(hidden.dtype)
            logits = jnp.einsum("...e,ev->...v", hidden, kernel, preferred_element_type=jnp.float32)
        return _scaled(logits, self, "head")

    def hidden(self, tokens, positions=None, segment_ids=None, cache=None, soft=None):
        """As `__call__`, but returns ([B, S, embed] before the head, cache or None).

        `soft`: None, or (embeddings [B, M, soft_width], index int32[B, S]): which of its row's
        embeddings stands for a token, -1 for none. UserError where the model has no such width.
        """
        start = 0 if cache is None else cache.length
        if positions is None:
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if cache is None:
            balance = context_parallel.balance
            tokens, positions, segment_ids = map(balance, (tokens, positions, segment_ids))
            soft = soft and (soft[0], balance(soft[1]))
        x = self.embedding[tokens].astype(jnp.dtype(self.config.dtype))
        if soft is not None:
            x = self._with_soft(x, *soft)
        x = _laid_out(x, cache)
        if cache is not None:
            cache = cache.replace(
                positions=jax.lax.dynamic_update_slice(cache.positions, positions, (0, start)),
                segment_ids=jax.lax.dynamic_update_slice(
                    cache.segment_ids, segment_ids, (0, start)
                ),
                length=cache.length + tokens.shape[1],
            )
        turned = None
        if self.config.positions == "rope":
            turns = rope.frequencies(
                self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
            )
            turned = rope.rotation(positions, turns)
        run = self._scan if isinstance(self.layers, Layer) else self._loop
        x, cache = run(x, (positions, segment_ids), turned, start, cache)
        if cache is None:
            x = context_parallel.restore(x)
        return self.final_norm(x), cache

    def _with_soft(self, x, embeddings, index):
        """`x` [B, S, embed] with the projected embeddings where `index` names one."""
        width = self.config.soft_width
        if embeddings.shape[-1] != width:
            raise UserError(
                f"the batch has soft tokens of width {embeddings.shape[-1]} and the model "
                f"soft_width={width}; give TransformerConfig.soft_width={embeddings.shape[-1]}"
            )
        soft = dense(embeddings.astype(x.dtype), self.soft_projector[...], (None, FSDP_AXIS))
        placed = jnp.take_along_axis(soft, jnp.maximum(index, 0)[..., None], axis=1)
        return jnp.where(index[..., None] >= 0, placed, x)

    def _scan(self, x, place, turned, start, cache):
        """All layers by one compiled body over their stack; the cache is written in place."""
        graphdef, state = nnx.split(self.layers)

        def body(carry, inputs):
            x, kept = carry
            state, index = inputs
            if kept is not None:
                kept = (*kept, index, start, (cache.positions, cache.segment_ids))
            layer = nnx.merge(graphdef, state)
            x, kept = layer(x, place, turned, kept)
            return (_laid_out(x, cache), kept), nnx.state(layer, nnx.Intermediate)

        if cache is None:
            body = remat.remat(body, self.config.remat)
        kept = None if cache is None else (cache.keys, cache.values)
        inputs = (state, jnp.arange(self.config.num_layers))
        (x, kept), seen = jax.lax.scan(body, (x, kept), inputs, unroll=self.config.scan_unroll)
        nnx.update(self.layers, seen)
        return x, cache if cache is None else cache.replace(keys=kept[0], values=kept[1])

    def _loop(self, x, place, turned, start, cache):
        """All layers one after another, each with arrays of its own."""
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            kept = None
            if cache is not None:
                slots = (cache.positions, cache.segment_ids)
                kept = (cache.keys[i], cache.values[i], None, start, slots)
            x, kept = layer(x, place, turned, kept)
            if kept is not None:
                keys.append(kept[0])
                values.append(kept[1])
        return x, cache and cache.replace(keys=tuple(keys), values=tuple(values))

    def init_cache(self, batch: int, max_len: int, kind: str | None = None) -> KVCache:
        """An empty cache of `max_len` slots for `batch` rows, rows and groups over the mesh.

        `kind`: of `kv_cache.KINDS`; None = in the compute type.
        """
        config = self.config
        shape = (batch, config.num_kv_heads, max_len, config.head_dim)

        def empty(*stack, alone: bool = False):
            def placed(zeros):
                axes = (*(None for _ in stack), STREAM_AXES, HEAD_AXIS)
                zeros = constrain(zeros, *axes)
                return zeros.reshape(zeros.shape[1:]) if alone else zeros

            return jax.tree.map(placed, kv_cache.empty((*stack, *shape), config.dtype, kind))

        if isinstance(self.layers, Layer):
            kept = [empty(config.num_layers) for _ in range(2)]
        else:
            layers = range(config.num_layers)
            kept = [tuple(empty(alone=batch == 1) for _ in layers) for _ in range(2)]
        places = [constrain(jnp.zeros((batch, max_len), jnp.int32), STREAM_AXES) for _ in range(2)]
        return KVCache(*kept, *places, jnp.zeros((), jnp.int32))
