"""A drafter beside split layers against one process, both computed in float64: prints the gaps of its gradients' norms.

    python tests/helpers/split_layers_float64.py FOLDER METHOD

Everything that asks torch for float32 gets float64, here and in the ranks: what is then still apart by more than 1e-9
is no rounding of sums in another order. The policy is written to FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FLOAT64 = """
import torch
load = torch.load
torch.float32 = torch.float = torch.float64
torch.Tensor.float = torch.Tensor.double
torch.set_default_dtype(torch.float64)
torch.load = lambda *a, **k: load(*a, **{**k, "weights_only": False})  # it knows numbers by the names that changed
"""


def main() -> None:
    exec(FLOAT64, globals())
    sys.path[:0] = [str(Path(__file__).parents[1] / "learner"), str(Path(__file__).parents[1])]
    import test_cotrain_distributed as cotrain
    from test_tensor_parallel import drafter_beside_split_layers

    from forerun.workers.server import PROGRAM
    from tiny_models import save_tiny

    folder, method = save_tiny(Path(sys.argv[1]), tie_word_embeddings=True), sys.argv[2]
    policy = cotrain.fresh(lambda *_, **__: folder)
    batches = cotrain.batches_of(policy)
    batches = cotrain.one_optimizer_step(batches) + batches[1:]
    _, expected = cotrain.alone(lambda *_, **__: folder, method, batches)
    _, found = drafter_beside_split_layers(policy, method, batches, FLOAT64 + PROGRAM)
    name = "draft/grad_norm"
    print(json.dumps([abs(a[name] / b[name] - 1) for a, b in zip(found, expected, strict=True)]))


if __name__ == "__main__":
    main()
