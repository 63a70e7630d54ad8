"""Causal grouped-query attention with square-root ALiBi as Pallas kernels for TPU.

FlashAttention-2 (arXiv 2307.08691): scores live one block at a time in VMEM, forward and backward,
and the bias is made from i - j inside: no array of sequence x sequence exists.
Choices:
- A program holds a block of queries of *all* heads of a group. What costs most beside the matrix
  products, sqrt(i - j) with the masks of causality and segments, is one table a block for all of
  them, and keys and values are fetched once.
- Scores are kept transposed, [keys, queries]: maxima and sums then run over sublanes, and the
  statistics of the queries are rows that broadcast without moving.
- Blocks that no query may see are neither computed nor fetched.
- Queries may be chunks of a longer sequence (context_parallel.py): where they stand in it is known
  only on the device, so the blocks to meet are read from prefetched scalars.
- The backward pass is one kernel over blocks of keys, in which the gradient of all its queries
  stays in VMEM: five products instead of the seven of two kernels. Queries that do not fit there
  take several turns, whose gradients of keys and values are summed.

`attention.attention` is the entrance; the same numbers by XLA alone are in blockwise_attention.py.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
"""Chunks of queries are multiples of it."""
_PIECE = 128  # keys of a block that the forward kernel takes at once
_LOWEST = -1e30  # finite: a block without a visible key gives exp(-inf - this) = 0, never a NaN
_VMEM_BYTES = 64 * 2**20  # what current chips have at least; v4 has less


def _vmem_bytes() -> int:
    """Of a core of the chip that the program is for, but no more than any current chip has."""
    try:
        return min(pltpu.get_tpu_info().vmem_capacity_bytes, _VMEM_BYTES)
    except ValueError:  # no TPU: interpreted, or a branch that will not be lowered
        return _VMEM_BYTES


def forward(
    query, key, value, segments, slopes, *, starts=None, block_size=512, interpret=False
):  # fmt: skip
    """Attention of a sequence, or of chunks of it, to the whole of it.

    Args:
      query: [B, K, G, S, D], already scaled: K groups of G heads each.
      key, value: [B, K, T, D].
      segments: (int32[B, S] of the queries, int32[B, T] of the keys); a query sees the keys of its
        segment that are not later.
      slopes: float32[K, G] of the heads, each above 0; None = no bias.
      starts: int32[C], rising: where among the keys the C chunks stand of which the queries
        consist; S / C is then a multiple of 128. None: the queries are the keys' tokens.
      block_size: queries and keys that meet at once, a multiple of 128; S needs not be one of it.
        Groups of many heads take smaller ones.
      interpret: run on any device, slowly: for tests.

    Returns:
      (output [B, K, G, S, D] in the type of `value`, log-sum-exp of the scores
      float32[B, K, G, S]).
    """
    tiling, length = _Tiling.of(query, key, starts, block_size), query.shape[3]
    query, key, value = tiling.pad_heads(query), tiling.pad_keys(key, 2), tiling.pad_keys(value, 2)
    shapes = (
        jax.ShapeDtypeStruct(query.shape, value.dtype),
        jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32),
    )
    heads, size, dim = tiling.heads, tiling.block, tiling.dim
    q, k = tiling.outer, tiling.seen
    output, log_sum = _call(
        _forward_kernel,
        tiling,
        (tiling.queries, tiling.keys),
        (query, key, value),
        [tiling.head_spec(q), tiling.key_spec(k), tiling.key_spec(k)],
        tiling.pad_segments(segments),
        tiling.places(starts),
        (q, k),
        shapes,
        [tiling.head_spec(q), tiling.row_spec(q)],
        [(heads, size), (heads, size), (heads, dim, size)],
        slopes,
        interpret,
        products=2,
        outer_blocks="parallel",
    )
    return output[:, :, :, :length], log_sum[..., :length]


def backward(
    query, key, value, segments, log_sum, correction, d_output, slopes, *,
    starts=None, block_size=512, interpret=False,
):  # fmt: skip
    """Gradients of `forward`'s output.

    Args:
      log_sum: of `forward`, float32[B, K, G, S].
      correction: float32[B, K, G, S], the sum over D of output * d_output.
      d_output: [B, K, G, S, D].

    The other arguments are those of `forward`.

    Returns:
      (d_query, d_key, d_value) in the shapes and types of query, key and value.
    """
    tiling, length, seen = _Tiling.of(query, key, starts, block_size), query.shape[3], key.shape[2]
    key, value = tiling.pad_keys(key, 2), tiling.pad_keys(value, 2)
    d_output = d_output.astype(value.dtype)
    of_queries = [tiling.pad_heads(x) for x in (query, d_output, log_sum, correction)]
    segments = tiling.pad_segments(segments)
    places = tiling.places(starts)
    d_query, d_key, d_value = [], 0.0, 0.0
    for first, last in tiling.turns():
        tokens = slice(first * tiling.block, last * tiling.block)
        # Queries of whole sequences see no later key.
        keys = slice(0, tokens.stop if starts is None else tiling.keys)
        turn = [x[:, :, :, tokens] for x in of_queries]
        seen_by = [x[:, :, keys] for x in (key, value)]
        part, *sums = _backward_turn(
            dataclasses.replace(tiling, queries=tokens.stop - tokens.start, keys=keys.stop),
            *turn, *seen_by, (segments[0][:, tokens], segments[1][:, keys]), places[first:last],
            slopes, interpret,
        )  # fmt: skip
        d_query.append(part)
        sums = (tiling.pad_keys(x, 2) for x in sums)
        d_key, d_value = (x + y for x, y in zip((d_key, d_value), sums, strict=True))
    d_query = jnp.concatenate(d_query, 3)[:, :, :, :length]
    return d_query, *(x[:, :, :seen].astype(key.dtype) for x in (d_key, d_value))


def _backward_turn(
    tiling, query, d_output, log_sum, correction, key, value, segments, places, slopes, interpret
):  # fmt: skip
    """(d_query, d_key, d_value) of some queries; those of keys and values in float32."""
    q, k = tiling.seeing, tiling.outer
    heads, keys, rows = tiling.head_spec(q), tiling.key_spec(k), tiling.row_spec(q)
    of_key = jax.ShapeDtypeStruct(key.shape, jnp.float32)
    block = (tiling.block, tiling.dim)
    return _call(
        _backward_kernel,
        tiling,
        (tiling.keys, tiling.queries),
        (query, key, value, d_output, log_sum, correction),
        [heads, keys, keys, heads, rows, rows],
        segments,
        places,
        (q, k),
        (jax.ShapeDtypeStruct(query.shape, query.dtype), of_key, of_key),
        [tiling.all_heads_spec(), tiling.key_spec(k), tiling.key_spec(k)],
        [(tiling.heads, tiling.queries, tiling.dim), block, block],
        slopes,
        interpret,
        products=5,
        outer_blocks="arbitrary",
    )


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """Sizes of a call, and its blocks: the grid is (batch, group, outer block, inner block).

    `queries` and `keys` are padded to whole blocks. The queries are the last of the keys or, not
    `whole`, `chunks` of equal length that stand anywhere.
    """

    batch: int
    groups: int
    heads: int
    queries: int
    keys: int
    dim: int
    block: int
    chunks: int
    whole: bool

    @classmethod
    def of(cls, query, key, starts, block_size: int):
        batch, groups, heads, length, dim = query.shape
        chunks = 1 if starts is None else len(starts)
        chunk = length // chunks
        if starts is not None and chunk % LANES:
            raise ValueError(f"chunks of {chunk} queries are no multiple of {LANES}")
        block = min(block_size, -(-chunk // LANES) * LANES)
        # Half of VMEM for the queries of a program and what is gathered for them.
        while block > LANES and heads * block * dim * 16 > _vmem_bytes() // 2:
            block = -(-block // 2 // LANES) * LANES
        while starts is not None and chunk % block:
            block -= LANES
        queries, keys = (-(-n // block) * block for n in (length, key.shape[2]))
        return cls(batch, groups, heads, queries, keys, dim, block, chunks, starts is None)

    def pad(self, x, axis: int, length: int, value=0):
        """`x` with `value` behind `axis` up to a length."""
        widths = [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=value)

    def pad_heads(self, x):
        return self.pad(x, 3, self.queries)

    def pad_keys(self, x, axis: int, value=0):
        return self.pad(x, axis, self.keys, value)

    def pad_segments(self, segments):
        """Padding is a segment of its own, which sees itself."""
        return self.pad(segments[0], 1, self.queries, -1), self.pad_keys(segments[1], 1, -1)

    def places(self, starts):
        """int32[queries / block]: the block of the keys at which each block of queries stands."""
        per_chunk = self.queries // self.block // self.chunks
        first = jnp.zeros(1, jnp.int32) if starts is None else starts // self.block
        return (first[:, None] + jnp.arange(per_chunk)).reshape(-1).astype(jnp.int32)

    def seen_from(self, places):
        """int32[keys / block]: the first block of queries that sees each block of keys."""
        key_blocks = jnp.arange(self.keys // self.block)
        before = (places[None] < key_blocks[:, None]).sum(1)
        return jnp.minimum(before, len(places) - 1).astype(jnp.int32)

    def turns(self):
        """Yields (first, behind the last) blocks of queries of which VMEM holds the gradients.

        A quarter of it, in float32; their bfloat16 copies take another.
        """
        blocks = self.queries // self.block
        fitting = max(_vmem_bytes() // 4 // (self.heads * self.block * self.dim * 4), 1)
        count = -(-blocks // fitting)
        bounds = [blocks * turn // count for turn in range(count + 1)]
        yield from itertools.pairwise(bounds)

    # Which block of queries or keys to fetch at (outer, inner): none that is not needed.
    @staticmethod
    def outer(outer, inner, place, seen_from):
        return outer

    @staticmethod
    def seen(outer, inner, place, seen_from):
        """Inner blocks of keys for an outer block of queries."""
        return jnp.minimum(inner, place[outer])

    @staticmethod
    def seeing(outer, inner, place, seen_from):
        """Inner blocks of queries for an outer block of keys."""
        return jnp.maximum(inner, seen_from[outer])

    def head_spec(self, block):
        """Of [B, K, G, S, D]."""
        shape = (1, 1, self.heads, self.block, self.dim)
        return pl.BlockSpec(shape, lambda b, k, *at: (b, k, 0, block(*at), 0))

    def all_heads_spec(self):
        """Of [B, K, G, S, D], all queries at once."""
        shape = (1, 1, self.heads, self.queries, self.dim)
        return pl.BlockSpec(shape, lambda b, k, *at: (b, k, 0, 0, 0))

    def row_spec(self, block):
        """Of [B, K, G, S]."""
        shape = (1, 1, self.heads, self.block)
        return pl.BlockSpec(shape, lambda b, k, *at: (b, k, 0, block(*at)))

    def key_spec(self, block):
        """Of [B, K, T, D]."""
        shape = (1, 1, self.block, self.dim)
        return pl.BlockSpec(shape, lambda b, k, *at: (b, k, block(*at), 0))

    def segment_specs(self, query_block, key_block):
        """Of [B, 1, S], a row for the queries, and [B, T, 1], a column for the keys."""
        row = pl.BlockSpec((1, 1, self.block), lambda b, k, *at: (b, 0, query_block(*at)))
        column = pl.BlockSpec((1, self.block, 1), lambda b, k, *at: (b, key_block(*at), 0))
        return [row, column]

    def cost(self, products: int, arrays) -> pl.CostEstimate:
        """Of the blocks that are computed, those on the diagonal among them.

        Chunks are taken to stand so that on average they see half of the keys.
        """
        seen = self.keys + self.block
        if self.whole:
            seen = 2 * self.keys - self.queries + self.block
        pairs = self.batch * self.groups * self.heads * self.queries * seen // 2
        return pl.CostEstimate(
            flops=2 * products * pairs * self.dim,
            transcendentals=pairs + pairs // self.heads,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        )


def _call(
    kernel, tiling, lengths, arrays, specs, segments, places, blocks, shapes, out_specs, scratch,
    slopes, interpret, products, outer_blocks,
):  # fmt: skip
    """Runs a kernel; it gets places, slopes, segments, `arrays`, outputs, `scratch` and the table.

    `lengths` are those over which the outer and the inner blocks of the grid go.
    """
    biased = slopes is not None
    slopes = slopes if biased else jnp.zeros((tiling.groups, tiling.heads), jnp.float32)
    table = pltpu.VMEM((tiling.block, tiling.block), jnp.float32)
    grid = (tiling.batch, tiling.groups, *(length // tiling.block for length in lengths))
    in_specs = [pl.BlockSpec(memory_space=pltpu.SMEM), *tiling.segment_specs(*blocks), *specs]
    return pl.pallas_call(
        functools.partial(kernel, tiling=tiling, biased=biased),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[*(pltpu.VMEM(shape, jnp.float32) for shape in scratch), table],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            # Forward, the outer blocks are independent; backward, they add to the same queries.
            dimension_semantics=("parallel", "parallel", outer_blocks, "arbitrary"),
            vmem_limit_bytes=_vmem_bytes(),
        ),
        cost_estimate=tiling.cost(products, (*arrays, *shapes)),
        interpret=interpret,
    )(
        places,
        tiling.seen_from(places),
        slopes,
        segments[0][:, None, :],
        segments[1][:, :, None],
        *arrays,
    )


def _dot(left, right, axes):
    """Contracts axis axes[0] of `left` with axes[1] of `right`, summed in float32."""
    exact = left.dtype == jnp.float32
    return jax.lax.dot_general(
        left,
        right,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _fill(table, query_segments, key_segments, blocks_ahead, tiling, biased):
    """table [keys, queries] = sqrt(i - j), or 0 without bias, where seen; inf elsewhere.

    The queries stand `blocks_ahead` blocks behind the keys.
    """
    shape = (tiling.block, tiling.block)
    ahead = blocks_ahead * tiling.block
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    distance = ahead + jax.lax.broadcasted_iota(jnp.int32, shape, 1) - row
    seen = (distance >= 0) & (query_segments[0] == key_segments[0])
    root = jnp.sqrt(jnp.maximum(distance, 0).astype(jnp.float32)) if biased else 0.0
    table[...] = jnp.where(seen, root, jnp.inf)


def _scores(product, slopes, distance, head, biased):
    """Float32 [keys, queries] of one head; -inf where not seen."""
    return product - (slopes[head] * distance if biased else distance)


def _forward_kernel(
    place, _, slopes, query_segments, key_segments, query, key, value, output, log_sum,
    top, total, mixed, table, *, tiling, biased,
):  # fmt: skip
    slopes, inner = slopes.at[pl.program_id(1)], pl.program_id(3)
    here = place[pl.program_id(2)]

    @pl.when(inner == 0)
    def start():
        top[...] = jnp.full_like(top, _LOWEST)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    @pl.when(inner <= here)
    def meet():
        _fill(table, query_segments, key_segments, here - inner, tiling, biased)
        # A piece's scores are asked of the matrix units before the softmax of the piece before, so
        # that these work while the vector units do. Pieces that fit in registers spill less.
        pieces = [
            (head, slice(at, at + _PIECE))
            for head in range(tiling.heads)
            for at in range(0, tiling.block, _PIECE)
        ]
        products = (_dot(key[0, 0, keys], query[0, 0, head], (1, 1)) for head, keys in pieces)
        ahead = next(products)
        for head, keys in pieces:
            one, product, ahead = slice(head, head + 1), ahead, next(products, None)
            scores = _scores(product, slopes, table[keys], head, biased)
            new_top = jnp.maximum(top[one], jnp.max(scores, 0, keepdims=True))
            weights = jnp.exp(scores - new_top)
            fade = jnp.exp(top[one] - new_top)
            top[one] = new_top
            total[one] = fade * total[one] + jnp.sum(weights, 0, keepdims=True)
            gain = _dot(value[0, 0, keys], weights.astype(value.dtype), (0, 0))
            mixed[head] = fade * mixed[head] + gain

    @pl.when(inner == here)
    def finish():
        for head in range(tiling.heads):
            normed = mixed[head] / total[head : head + 1]
            output[0, 0, head] = normed.T.astype(output.dtype)
        log_sum[0, 0] = top[...] + jnp.log(total[...])


def _weights_and_gradient(slopes, arrays, table, head, biased):
    """Softmax weights and the scores' gradient of one head, float32 [keys, queries]."""
    query, key, value, d_output, log_sum, correction = arrays
    product = _dot(key[0, 0], query[0, 0, head], (1, 1))
    scores = _scores(product, slopes, table[...], head, biased)
    weights = jnp.exp(scores - log_sum[0, 0, head : head + 1])
    d_weights = _dot(value[0, 0], d_output[0, 0, head], (1, 1))
    return weights, weights * (d_weights - correction[0, 0, head : head + 1])


def _backward_kernel(
    place, _, slopes, query_segments, key_segments, query, key, value, d_output, log_sum,
    correction, d_query, d_key, d_value, of_query, of_key, of_value, table, *, tiling, biased,
):  # fmt: skip
    arrays = (query, key, value, d_output, log_sum, correction)
    slopes, outer, inner = slopes.at[pl.program_id(1)], pl.program_id(2), pl.program_id(3)
    there, rows = place[inner], pl.ds(inner * tiling.block, tiling.block)

    @pl.when(inner == 0)
    def start_keys():
        of_key[...] = jnp.zeros_like(of_key)
        of_value[...] = jnp.zeros_like(of_value)

    @pl.when(outer == 0)
    def start_queries():
        of_query[:, rows] = jnp.zeros((tiling.heads, tiling.block, tiling.dim), jnp.float32)

    @pl.when(there >= outer)
    def meet():
        _fill(table, query_segments, key_segments, there - outer, tiling, biased)
        for head in range(tiling.heads):
            weights, d_scores = _weights_and_gradient(slopes, arrays, table, head, biased)
            d_scores = d_scores.astype(key.dtype)
            of_value[...] += _dot(weights.astype(value.dtype), d_output[0, 0, head], (1, 0))
            of_key[...] += _dot(d_scores, query[0, 0, head], (1, 0))
            of_query[head, rows] += _dot(d_scores, key[0, 0], (0, 0))

    last = inner == tiling.queries // tiling.block - 1

    @pl.when(last)
    def finish_keys():
        d_key[0, 0] = of_key[...]
        d_value[0, 0] = of_value[...]

    @pl.when(last & (outer == tiling.keys // tiling.block - 1))
    def finish_queries():
        d_query[0, 0] = of_query[...].astype(d_query.dtype)
