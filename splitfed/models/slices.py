"""Slices of a trunk: what the server runs for an agent whose split points lie further inside than another's."""

from splitfed.errors import SplitPointError
from splitfed.models.cut import cut
from splitfed.models.families import family_of
from splitfed.models.segment import Trunk


def trunk_slice(trunk: Trunk, blocks: range) -> Trunk:
    """Cut a trunk over fewer of its blocks, around the very same parameters.

    Take it once the trunk has its adapter, its dtype and its device: parameters and buffers are shared as they are
    then, and layers that are put in later are the trunk's alone.

    Args:
        trunk: A trunk, or a slice of one; it stays usable. Load it with ``bottom_blocks=0`` and ``top_blocks=0`` for
            every slice of the model.
        blocks: Indices in the whole model, consecutive, at least one, all of them the trunk's.

    Raises:
        SplitPointError: If ``blocks`` is anything else.

    Guarantees:
        * The slice gives the same output and gradients, to the bit, as the trunk of a partition at these split points.
        * It holds no tensor of its own: base, adapter and residual are the trunk's ``Parameter`` objects, buffers its
          buffers.
        * A change of the trunk's adapter is a change of the slice's, and their keys are the whole model's.
        * Its cache counts its own blocks only, and the trunk works as before.
    """
    if blocks.step != 1 or not blocks or blocks.start < trunk.blocks.start or blocks.stop > trunk.blocks.stop:
        raise SplitPointError(
            f"Blocks {blocks.start} to {blocks.stop - 1} are no slice of a trunk of blocks {trunk.blocks.start} to "
            f"{trunk.blocks.stop - 1}; ask for consecutive blocks among these, at least one."
        )
    local = range(blocks.start - trunk.blocks.start, blocks.stop - trunk.blocks.start)
    family = family_of(trunk.config.model_type)
    model = cut(trunk.model, family, blocks=local, has_embeddings=False, has_head=False)
    return Trunk(model, blocks=blocks, adaptable_names=trunk.adaptable_names)
