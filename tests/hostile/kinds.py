"""All the kinds of broken checkpoints."""

from tests.hostile import config_kinds, file_kinds, tensor_kinds

KINDS = {
    kind.name: kind
    for kind in (*config_kinds.KINDS, *file_kinds.KINDS, *tensor_kinds.KINDS)
}
