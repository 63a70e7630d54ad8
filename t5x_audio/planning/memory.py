"""Where the memory of a compiled step goes, per device.

Parameters, optimiser and batch follow from the shardings; what lives during the step is the
compiler's sum, of which the stacks that loops over layers write are told apart by where they are
written: in the forward pass saved activations, in the backward pass gradients.
"""

import dataclasses
import math

import jax

from t5x_audio.planning.hlo import Module


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters, optimizer, other_state: of the train state.
      batch: of the inputs.
      activations: saved by the forward pass for the backward pass, layer by layer.
      gradients: of stacked parameters, layer by layer.
      temporaries: all else that lives at the peak.
      code: of the program.
      total: at the peak, as the compiler says.
    """

    parameters: int
    optimizer: int
    other_state: int
    batch: int
    activations: int
    gradients: int
    temporaries: int
    code: int
    total: int


def local_bytes(tree) -> int:
    """Bytes on one device of ShapeDtypeStructs with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def split(compiled, module: Module, template, batch) -> Memory:
    """The memory of a compiled step.

    Args:
      compiled: of `jax.stages.Lowered.compile`.
      module: its HLO.
      template: the TrainState with shardings.
      batch: its ShapeDtypeStructs with shardings.
    """
    stats = compiled.memory_analysis()
    stacks = {"forward": 0, "backward": 0}
    for loop in module.entry.instructions.values():
        if loop.opcode == "while":
            for name, size in _written(module, loop):
                stacks["backward" if "transpose(" in name else "forward"] += size
    temporary = stats.temp_size_in_bytes
    activations = min(stacks["forward"], temporary)
    gradients = min(stacks["backward"], temporary - activations)
    arguments = stats.argument_size_in_bytes
    output = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    return Memory(
        parameters=local_bytes(template.params),
        optimizer=local_bytes(template.opt_state),
        other_state=local_bytes((template.step, template.variables)),
        batch=local_bytes(batch),
        activations=activations,
        gradients=gradients,
        temporaries=temporary - activations - gradients,
        code=stats.generated_code_size_in_bytes,
        total=arguments + output + temporary + stats.generated_code_size_in_bytes,
    )


def _written(module: Module, loop):
    """(name of the operation, bytes) of every stack that a loop fills slice by slice."""
    body = module.computations[loop.called("body")]
    if body.root.opcode != "tuple":
        return
    for operand in body.root.operands:
        value, computation = body.instructions[operand], body
        size = value.result_bytes
        if value.opcode == "fusion":
            computation = module.computations[value.called("calls")]
            value = computation.root
        while value.opcode in ("bitcast", "copy"):
            value = computation.instructions[value.operands[0]]
        if value.opcode == "dynamic-update-slice":
            found = value.attribute("metadata") or body.instructions[operand].attribute("metadata")
            yield found or "", size


@dataclasses.dataclass(frozen=True)
class DecoderMemory:
    """Bytes on one device of a decoder.

    Attributes:
      weights: of the model, as they are kept.
      cache: of all layers, with the logits between two tokens.
      prompt_temporaries, token_temporaries: all else that lives while one or the other runs.
      code: of both programs.
      total: at the peak of the one that needs more.
    """

    weights: int
    cache: int
    prompt_temporaries: int
    token_temporaries: int
    code: int
    total: int


def of_decoder(weights, prefill, decode) -> DecoderMemory:
    """The memory of a decoder.

    Args:
      weights: ShapeDtypeStructs with shardings.
      prefill, decode: the compiled programs.
    """
    prompt, token = prefill.memory_analysis(), decode.memory_analysis()
    kept, code = local_bytes(weights), prompt.generated_code_size_in_bytes
    code += token.generated_code_size_in_bytes
    cache = prompt.output_size_in_bytes
    temporaries = prompt.temp_size_in_bytes, token.temp_size_in_bytes
    return DecoderMemory(kept, cache, *temporaries, code, kept + cache + max(temporaries) + code)
