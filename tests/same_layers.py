"""Are two models the same but for rounding?"""


def assert_same_layers(a, b, bound=1e-6):
    """Each tensor of {name: tensor} within `bound` of its norm; a bias, within that of the weight beside it.

    A bias begins at 0 and is a few updates small: of its own norm, rounding in sums over thousands of rows may be more
    than `bound`, and a key's, which shifts a query's scores alike, is nothing else.
    """
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        weight = a.get(name.removesuffix("bias") + "weight", tensor) if name.endswith("bias") else tensor
        assert (tensor - b[name]).norm() <= bound * weight.norm(), name
