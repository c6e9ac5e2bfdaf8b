"""All the kinds of broken checkpoints."""

from tests.hostile import cluster_kinds, config_kinds, file_kinds, tensor_kinds

KINDS = {
    kind.name: kind
    for module in (cluster_kinds, config_kinds, file_kinds, tensor_kinds)
    for kind in module.KINDS
}
