"""Each compiled operation is its definition in float64, forwards and backwards, whatever the shapes and layouts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.compiled import use_kernels

from mlx_cpo_plugin import blas
from mlx_cpo_plugin.kernels import library, operations
from mlx_cpo_plugin.kernels.operations import Segment, Weight

Array = NDArray[np.float64]
Function = Callable[..., mx.array]
TOLERANCE = 1e-5
few_examples = settings(max_examples=25)
pytestmark = pytest.mark.slow  # to compile takes ten seconds


@pytest.fixture(autouse=True, scope="module")
def _loaded() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_kernels(patch)
        with blas.one_thread():
            yield


# Layouts of an array in memory: none changes what it holds.
LAYOUTS: dict[str, Callable[[Array], mx.array]] = {
    "row by row": lambda x: mx.array(x.astype(np.float32)),
    "transposed": lambda x: mx.array(np.swapaxes(x, -1, -2).astype(np.float32)).swapaxes(-1, -2),
    "every other number": lambda x: mx.array(np.repeat(x, 2, axis=-1).astype(np.float32))[..., ::2],
    "backwards": lambda x: mx.array(x[..., ::-1].astype(np.float32))[..., ::-1],
    "part of longer rows": lambda x: mx.array(np.concatenate([x, x], axis=-1).astype(np.float32))[..., : x.shape[-1]],
    "part of more rows": lambda x: mx.array(np.concatenate([x, x], axis=-2).astype(np.float32))[..., -x.shape[-2] :, :],
}
layouts = st.sampled_from(sorted(LAYOUTS))


class Numbers:
    """Random numbers of float32, as float64, and as arrays of MLX in some layout."""

    def __init__(self, seed: int, layout: str = "row by row") -> None:
        self.rng, self.layout = np.random.default_rng(seed), layout

    def __call__(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape).astype(np.float32).astype(np.float64)

    def laid_out(self, x: Array) -> mx.array:
        array = LAYOUTS[self.layout](x)
        mx.eval(array)
        return array


def assert_close(found: mx.array, expected: Array, what: str, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape, what
    error, size = (np.linalg.norm(x) for x in (np.array(found, np.float64) - expected, expected))
    # Inputs are about 1 each: results that are smaller are the difference of large ones.
    assert error <= tolerance * max(size, np.sqrt(expected.size)), f"{what}: {error:.1e} of {size:.1e}"


def assert_defined(
    function: Function,
    inputs: Sequence[Array],
    output: Array,
    slope: Array,
    gradients: Sequence[Array],
    numbers: Numbers,
) -> None:
    """The function and its gradients, for ``slope`` arriving at its output, are as expected."""
    arrays = [numbers.laid_out(x) for x in inputs]
    outputs, found = mx.vjp(lambda *x: [function(*x)], arrays, [numbers.laid_out(slope)])
    assert_close(outputs[0], output, "output")
    for number, (gradient, expected) in enumerate(zip(found, gradients, strict=True)):
        assert_close(gradient, expected, f"gradient {number}")


STORED = ("float32", "bfloat16", "float16", "packed")


def stored(numbers: Numbers, rows: int, columns: int, kind: str, bits: int, group: int) -> tuple[Weight, Array]:
    """A weight as it is stored, and what it stands for."""
    weight = mx.array(numbers(rows, columns).astype(np.float32))
    if kind != "packed":
        weight = weight.astype(getattr(mx, kind))
        return Weight((weight,)), np.array(weight.astype(mx.float32), np.float64)
    scales_dtype = (mx.float32, mx.bfloat16, mx.float16)[numbers.rng.integers(3)]
    packed, scales, biases = mx.quantize(weight.astype(scales_dtype), group_size=group, bits=bits)
    whole = np.array(packed)[..., None] >> (np.arange(32 // bits) * bits).astype(np.uint32) & (2**bits - 1)
    wide = whole.reshape(rows, columns // group, group) * np.array(scales.astype(mx.float32), np.float64)[..., None]
    wide = wide + np.array(biases.astype(mx.float32), np.float64)[..., None]
    return Weight((packed, scales, biases), bits, group), wide.reshape(rows, columns)


weights = st.fixed_dictionaries(
    {"kind": st.sampled_from(STORED), "bits": st.sampled_from([2, 4, 8]), "group": st.sampled_from([32, 64, 128])}
)


@given(
    shape=st.lists(st.integers(1, 37), min_size=1, max_size=3),
    columns=st.integers(1, 70),
    rows=st.integers(1, 90),
    rank=st.integers(0, 9),
    weight=weights,
    layout=layouts,
    seed=st.integers(0, 2**31),
)
def test_linear_layers_with_and_without_an_adapter(
    shape: list[int], columns: int, rows: int, rank: int, weight: dict[str, Any], layout: str, seed: int
) -> None:
    numbers = Numbers(seed, layout if len(shape) > 1 else "row by row")
    if weight["kind"] == "packed":
        columns = weight["group"] * (1 + columns % 3)
    taken, wide = stored(numbers, rows, columns, **weight)
    x, dy = numbers(*shape, columns), numbers(*shape, rows)
    if not rank:
        assert_defined(lambda x: operations.linear(x, taken), [x], x @ wide.T, dy, [dy @ wide], numbers)
        return
    a, b = numbers(columns, rank), numbers(rank, rows)
    flat_x, flat_dy = x.reshape(-1, columns), dy.reshape(-1, rows)
    of_adapter = [1.5 * flat_x.T @ flat_dy @ b.T, 1.5 * (flat_x @ a).T @ flat_dy]
    assert_defined(
        lambda x, a, b: operations.adapted_linear(x, taken, a, b, 1.5),
        [x, a, b],
        x @ wide.T + 1.5 * (x @ a) @ b,
        dy,
        [dy @ wide + 1.5 * dy @ b.T @ a.T, *of_adapter],
        numbers,
    )
    assert_defined(
        lambda x, a, b: operations.adapted_linear(x, taken, a, b, 1.5, merged=True),
        [x, a, b],
        x @ wide.T,
        dy,
        [dy @ wide, *of_adapter],
        numbers,
    )


@pytest.fixture(params=[True, False], ids=["with the matrix unit", "without it"])
def _matrix_unit(request: pytest.FixtureRequest) -> Iterator[None]:
    use: Callable[[bool], bool] = library._loaded().cpo_use_tiles
    if not use(request.param) and request.param:
        pytest.skip("needs an x86 processor with AMX")
    yield
    use(True)


# Rows, columns and depth at, below and beyond those of tiles, of their blocks and of what is packed at a time.
@pytest.mark.usefixtures("_matrix_unit")
@pytest.mark.parametrize(("m", "n", "k"), [(23, 40, 64), (24, 32, 32), (33, 290, 31), (64, 17, 1025), (65, 300, 2100)])
def test_products_with_bfloat16_weights(m: int, n: int, k: int) -> None:
    numbers = Numbers(m)
    weight, wide = stored(numbers, n, k, "bfloat16", 0, 0)
    x, dy = numbers(m, k), numbers(m, n)
    tight = 1e-6  # as float32 is, where parts of bfloat16 alone are off by 1e-3
    outputs, gradients = mx.vjp(lambda x: [operations.linear(x, weight)], [numbers.laid_out(x)], [numbers.laid_out(dy)])
    assert_close(outputs[0], x @ wide.T, "output", tight)
    assert_close(gradients[0], dy @ wide, "gradient", tight)

    hidden, targets = numbers(m, k) / 64, numbers.rng.integers(n, size=m)
    shares = np.exp(hidden @ wide.T)
    shares /= shares.sum(-1, keepdims=True)
    logps, gradients = mx.vjp(
        lambda x: [operations.target_scores(x, mx.array(targets.astype(np.int32)), weight, True)[0]],
        [numbers.laid_out(hidden)],
        [mx.ones(m)],
    )
    assert_close(logps[0], np.log(shares[np.arange(m), targets]), "log-probs", tight)
    assert_close(gradients[0], wide[targets] - shares @ wide, "gradient of log-probs", tight)


@given(shape=st.lists(st.integers(1, 40), min_size=2, max_size=4), layout=layouts, seed=st.integers(0, 2**31))
def test_norms_of_arrays_of_any_number_of_dimensions(shape: list[int], layout: str, seed: int) -> None:
    numbers = Numbers(seed, layout)
    x, weight, dy = numbers(*shape), numbers(shape[-1]), numbers(*shape)
    factor = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    along = (dy * weight * x).mean(-1, keepdims=True)
    taken = mx.array(weight.astype(np.float32))

    assert_defined(
        lambda x: operations.rms_norm(x, taken, 1e-5),
        [x],
        x * factor * weight,
        dy,
        [dy * weight * factor - x * along * factor**3],
        numbers,
    )


@given(shape=st.lists(st.integers(1, 40), min_size=2, max_size=4), layout=layouts, seed=st.integers(0, 2**31))
def test_activations_of_arrays_of_any_number_of_dimensions(shape: list[int], layout: str, seed: int) -> None:
    numbers = Numbers(seed, layout)
    gate, x, dy = 4 * numbers(*shape), numbers(*shape), numbers(*shape)
    open_ = 1 / (1 + np.exp(-gate))
    slope = open_ * (1 + gate * (1 - open_))
    assert_defined(operations.silu_gate, [gate, x], gate * open_ * x, dy, [dy * x * slope, dy * gate * open_], numbers)
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    steepness = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * gate**2)
    gelu_slope = (1 + np.tanh(inner)) / 2 + gate / 2 * (1 - np.tanh(inner) ** 2) * steepness
    assert_defined(operations.gelu, [gate], gate / 2 * (1 + np.tanh(inner)), dy, [dy * gelu_slope], numbers)


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    half=st.integers(1, 12),
    rest=st.integers(0, 5),
    neighbours=st.booleans(),
    each_row=st.booleans(),
    layout=layouts,
    seed=st.integers(0, 2**31),
)
def test_rotations_of_all_or_the_first_numbers_of_a_row(
    shape: tuple[int, int, int], half: int, rest: int, neighbours: bool, each_row: bool, layout: str, seed: int
) -> None:
    numbers, (batch, _, count) = Numbers(seed, layout), shape
    angles = numbers(batch if each_row else 1, count, half)
    tables = [mx.array(function(angles).astype(np.float32)) for function in (np.cos, np.sin)]
    x, dy = numbers(*shape, 2 * half + rest), numbers(*shape, 2 * half + rest)

    def turned(x: Array, sign: int) -> Array:
        first, second = np.arange(half), np.arange(half, 2 * half)
        if neighbours:
            first, second = 2 * first, 2 * first + 1
        whole = (x[..., first] + 1j * x[..., second]) * np.exp(sign * 1j * angles[:, None])
        result = x.copy()
        result[..., first], result[..., second] = whole.real, whole.imag
        return result

    assert_defined(
        lambda x: operations.rotated(x, *tables, neighbours), [x], turned(x, 1), dy, [turned(dy, -1)], numbers
    )


def seen_keys(segments: Sequence[Segment], window: int | None) -> Iterator[tuple[int, Array]]:
    """Yield each query and the keys that it sees."""
    for first_query, queries, first_prefix_key, prefix_keys, first_own_key in segments:
        for query in range(queries):
            keys = [*range(first_prefix_key, first_prefix_key + prefix_keys)]
            keys += range(first_own_key, first_own_key + query + 1)
            yield first_query + query, np.array(keys[-window:] if window else keys)


def attended(
    q: Array, k: Array, v: Array, scale: float, segments: Sequence[Segment], window: int | None, slope: Array
) -> tuple[Array, list[Array]]:
    """Attention by its definition: the output and the gradients."""
    group = q.shape[1] // k.shape[1]
    output, gradients = np.zeros(slope.shape), [np.zeros(x.shape) for x in (q, k, v)]
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            of_keys = (row, head // group)
            for query, keys in seen_keys(segments, window):
                scores = scale * k[of_keys][keys] @ q[row, head, query]
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                output[row, head, query] = shares @ v[of_keys][keys]
                of_shares = v[of_keys][keys] @ slope[row, head, query]
                of_scores = scale * shares * (of_shares - shares @ of_shares)
                gradients[0][row, head, query] = of_scores @ k[of_keys][keys]
                gradients[1][of_keys][keys] += of_scores[:, None] * q[row, head, query]
                gradients[2][of_keys][keys] += shares[:, None] * slope[row, head, query]
    return output, gradients


def packed_segments(pairs: Sequence[tuple[int, int, int]]) -> list[Segment]:
    """Prefix and two answers of each pair, one behind the other."""
    segments, end = [], 0
    for prefix, *answers in pairs:
        start = end
        for count, before in [(prefix, 0), *((answer, prefix) for answer in answers)]:
            if count:
                segments.append(Segment(end, count, start, before, end))
                end += count
    return segments


@given(
    pairs=st.lists(st.tuples(st.integers(0, 80), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=2),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    window=st.none() | st.integers(1, 40),
    layout=layouts,
    seed=st.integers(0, 2**31),
)
@few_examples
def test_attention_of_packed_pairs(
    pairs: list[tuple[int, int, int]],
    heads: int,
    group: int,
    sizes: tuple[int, int],
    window: int | None,
    layout: str,
    seed: int,
) -> None:
    numbers, segments = Numbers(seed, layout), packed_segments(pairs)
    count = sum(segment.queries for segment in segments)
    q, k = numbers(1, heads * group, count, sizes[0]), numbers(1, heads, count, sizes[0])
    v, slope = numbers(1, heads, count, sizes[1]), numbers(1, heads * group, count, sizes[1])
    output, gradients = attended(q, k, v, 0.5, segments, window, slope)

    assert_defined(
        lambda *x: operations.attention(*x, 0.5, segments, window), [q, k, v], output, slope, gradients, numbers
    )


@given(
    batch=st.integers(1, 3),
    before=st.integers(0, 90),
    queries=st.integers(1, 70),
    window=st.none() | st.integers(1, 100),
    layout=layouts,
    seed=st.integers(0, 2**31),
)
@few_examples
def test_attention_of_rows_behind_a_prefix(
    batch: int, before: int, queries: int, window: int | None, layout: str, seed: int
) -> None:
    numbers, segments = Numbers(seed, layout), [Segment(0, queries, 0, before, before)]
    q, k, v, slope = (numbers(batch, 2, count, 4) for count in (queries, *[before + queries] * 2, queries))
    output, gradients = attended(q, k, v, 0.5, segments, window, slope)

    assert_defined(
        lambda *x: operations.attention(*x, 0.5, segments, window), [q, k, v], output, slope, gradients, numbers
    )


@pytest.mark.parametrize(("heads", "key_heads"), [(16, 8), (9, 3), (12, 4)])
def test_gradients_of_many_keys_are_summed_in_less_memory_than_each_head_would_take(heads: int, key_heads: int) -> None:
    keys, queries, size = 2**24 // (heads * 2 * 128) + 1, 3, 128  # a few more than have sums for each head
    numbers, segments = Numbers(2), [Segment(0, queries, 0, keys - queries, keys - queries)]
    q, k, v = numbers(1, heads, queries, size), numbers(1, key_heads, keys, size), numbers(1, key_heads, keys, size)
    slope = mx.array(numbers(1, heads, queries, size).astype(np.float32))
    arrays = [mx.array(x.astype(np.float32)) for x in (q, k, v)]
    expected = mx.vjp(
        lambda *x: [mx.fast.scaled_dot_product_attention(*x, scale=0.05, mask="causal")], arrays, [slope]
    )[1]

    found = mx.vjp(lambda *x: [operations.attention(*x, 0.05, segments)], arrays, [slope])[1]

    for gradient, reference in zip(found, expected, strict=True):
        assert mx.linalg.norm(gradient - reference) < 1e-5 * mx.linalg.norm(reference)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_gradients_arrive_broadcast_along_any_axis(axes: tuple[int, ...]) -> None:
    numbers, segments = Numbers(0), [Segment(0, 7, 0, 3, 3)]
    q, k, v = numbers(2, 4, 7, 8), numbers(2, 2, 10, 8), numbers(2, 2, 10, 8)
    table = mx.random.normal((1, 7, 4))
    slope = numbers(*(1 if axis in axes else size for axis, size in enumerate((2, 4, 7, 8))))
    wide = np.broadcast_to(slope, (2, 4, 7, 8))
    for function in (
        lambda q: operations.attention(q, *(mx.array(x.astype(np.float32)) for x in (k, v)), 0.5, segments),
        lambda q: operations.rotated(q, table, table, False),
        lambda q: operations.gelu(q),
    ):
        x = mx.array(q.astype(np.float32))
        broadcast = mx.vjp(
            lambda x, f=function: [f(x)], [x], [mx.broadcast_to(mx.array(slope, mx.float32), wide.shape)]
        )
        plain = mx.vjp(lambda x, f=function: [f(x)], [x], [mx.array(wide.astype(np.float32))])
        assert mx.array_equal(broadcast[1][0], plain[1][0])


def test_one_row_of_keys_stands_for_several_after_a_broadcast() -> None:
    numbers, segments = Numbers(1), [Segment(0, 5, 0, 0, 0)]
    q, k = (mx.array(numbers(*shape).astype(np.float32)) for shape in ((3, 2, 5, 4), (1, 1, 5, 4)))
    wide = mx.broadcast_to(k, (3, 2, 5, 4))

    found = operations.attention(q, wide, wide, 0.5, segments)

    assert mx.array_equal(found, operations.attention(q, *[mx.array(np.array(wide))] * 2, 0.5, segments))


@given(
    count=st.integers(1, 300),
    vocabulary=st.integers(1, 700),
    columns=st.integers(1, 40),
    weight=weights,
    differentiate=st.booleans(),
    layout=layouts,
    seed=st.integers(0, 2**31),
)
@few_examples
def test_scores_of_targets(
    count: int, vocabulary: int, columns: int, weight: dict[str, Any], differentiate: bool, layout: str, seed: int
) -> None:
    numbers = Numbers(seed, layout)
    columns = weight["group"] if weight["kind"] == "packed" else columns
    taken, wide = stored(numbers, vocabulary, columns, **weight)
    hidden, targets = numbers(count, columns), numbers.rng.integers(0, vocabulary, count).astype(np.int32)
    logits, slope = hidden @ wide.T, numbers(count)
    highest = logits.max(-1, keepdims=True)
    sums = np.exp(logits - highest).sum(-1)
    at = (np.arange(count), targets)
    logps = logits[at] - highest[:, 0] - np.log(sums)
    shares = np.exp(logits - highest) / sums[:, None]

    found, raw = operations.target_scores(numbers.laid_out(hidden), mx.array(targets), taken, differentiate)

    assert np.allclose(np.array(raw), logits[at], rtol=1e-4, atol=1e-4)
    assert np.allclose(np.array(found), logps, rtol=1e-5, atol=1e-4)
    if differentiate:
        (gradient,) = mx.vjp(
            lambda x: [operations.target_scores(x, mx.array(targets), taken, True)[0]],
            [numbers.laid_out(hidden)],
            [mx.array(slope.astype(np.float32))],
        )[1]
        assert_close(gradient, slope[:, None] * (wide[targets] - shares @ wide), "gradient", 1e-4)


SEGMENTS = packed_segments([(50, 20, 9), (0, 12, 33)])
NORMAL = Numbers(3)
Q, K, V = (mx.array(NORMAL(1, heads, 124, 16).astype(np.float32)) for heads in (4, 2, 2))
X, WIDE = (mx.array(NORMAL(*shape).astype(np.float32)) for shape in ((124, 64), (200, 64)))
A, B = (mx.array(NORMAL(*shape).astype(np.float32)) for shape in ((64, 5), (5, 200)))
# Enough rows for several parts for each of a few threads.
TALL = mx.array(NORMAL(9000, 64).astype(np.float32))
ANGLES = mx.array(NORMAL(1, 124, 8).astype(np.float32))
TARGETS = mx.array(NORMAL.rng.integers(0, 200, 124).astype(np.int32))
# Functions of one array each, with all that a thread may share with another.
OPERATIONS: dict[str, tuple[Function, mx.array]] = {
    "linear": (lambda x: operations.linear(x, Weight((WIDE,))), X),
    "linear, in many parts": (lambda x: operations.linear(x, Weight((TALL,))), X),
    "adapted": (lambda x: operations.adapted_linear(x, Weight((WIDE.astype(mx.bfloat16),)), A, B, 2.0), X),
    "packed": (lambda x: operations.linear(x, Weight(tuple(mx.quantize(WIDE, 32, 4)), 4, 32)), X),
    "norm": (lambda x: operations.rms_norm(x, X[0], 1e-5), X),
    "rotation": (lambda x: operations.rotated(x, mx.cos(ANGLES), mx.sin(ANGLES), True), Q),
    "attention": (lambda q: operations.attention(q, K, V, 0.2, SEGMENTS), Q),
    "window": (lambda q: operations.attention(q, K, V, 0.2, SEGMENTS, 11), Q),
    "silu": (lambda x: operations.silu_gate(x, x), X),
    "gelu": (operations.gelu, X),
    "head": (lambda x: operations.target_scores(x, TARGETS, Weight((WIDE,)), True)[0], X),
    "head, in many parts": (lambda x: operations.target_scores(x, TARGETS, Weight((TALL,)), True)[0], X),
}
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def results(name: str, scale: float = 1.0) -> list[Array]:
    function, x = OPERATIONS[name]

    def squares(x: mx.array) -> mx.array:
        return mx.square(function(x)).sum()

    found = [function(scale * x), mx.grad(squares)(scale * x)]
    mx.eval(found)
    return [np.array(array) for array in found]


def equal(left: Sequence[Array], right: Sequence[Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@each_operation
def test_results_are_the_same_to_the_bit_on_each_call(name: str) -> None:
    first = results(name)

    assert all(equal(first, results(name)) for _ in range(10))


@each_operation
def test_the_number_of_threads_changes_no_more_than_rounding(name: str) -> None:
    product = ctypes.c_void_p(blas.product())
    loaded, expected = library._loaded(), results(name)
    try:
        for threads in (1, 2, 3, 7):
            loaded.cpo_start(threads, product)
            for found, wanted in zip(results(name), expected, strict=True):
                assert_close(mx.array(found), wanted.astype(np.float64), f"{threads} threads", 1e-6)
    finally:
        loaded.cpo_start(blas.kernel_threads(), product)


@each_operation
@pytest.mark.parametrize("scale", [0.0, 60.0, 1e4])
def test_no_result_is_subnormal_or_lost_where_numbers_are_far_apart(name: str, scale: float) -> None:
    for found in results(name, scale):
        assert np.isfinite(found).all()
        assert not ((found != 0) & (np.abs(found) < np.finfo(np.float32).tiny)).any()


@each_operation
def test_what_is_no_number_stays_visible(name: str) -> None:
    function, x = OPERATIONS[name]
    broken = mx.where(mx.arange(x.size).reshape(x.shape) == 70, mx.nan, x)

    assert mx.isnan(function(broken)).any()


@each_operation
def test_any_stream_and_any_python_thread_computes_the_same(name: str) -> None:
    expected = results(name)

    def in_a_stream() -> list[Array]:
        with mx.stream(mx.new_stream(mx.cpu)):
            return results(name)

    assert equal(in_a_stream(), expected)
    with ThreadPoolExecutor(4) as pool:
        for found in [pool.submit(in_a_stream) for _ in range(12)]:
            assert equal(found.result(), expected)


@each_operation
def test_a_compiled_function_computes_the_same(name: str) -> None:
    function, x = OPERATIONS[name]
    compiled = mx.compile(function)

    assert equal([np.array(compiled(x))], results(name)[:1])
    assert equal([np.array(compiled(x))], results(name)[:1])


@each_operation
def test_a_checkpointed_function_has_the_same_gradient(name: str) -> None:
    function, x = OPERATIONS[name]

    gradient = mx.grad(lambda x: mx.square(mx.checkpoint(function)(x)).sum())(x)

    assert equal([np.array(gradient)], results(name)[1:])


@each_operation
def test_what_has_no_meaning_here_raises(name: str) -> None:
    function, x = OPERATIONS[name]
    with pytest.raises((ValueError, RuntimeError)):
        mx.eval(mx.jvp(lambda x: [function(x)], [x], [x]))
    with pytest.raises((ValueError, RuntimeError)):
        mx.eval(mx.vmap(function)(mx.stack([x, x])))


def test_a_weight_has_no_gradient() -> None:
    with pytest.raises(ValueError, match="weight"):
        mx.grad(lambda weight: operations.linear(X, Weight((weight,))).sum())(WIDE)


half = X.astype(mx.bfloat16)
packed = tuple(mx.quantize(WIDE, 32, 4))
REFUSED: dict[str, Callable[[], Any]] = {
    "half-precision inputs": lambda: operations.linear(half, Weight((WIDE,))),
    "too narrow inputs": lambda: operations.linear(X[:, :63], Weight((WIDE,))),
    "a weight of integers": lambda: operations.linear(X, Weight((WIDE.astype(mx.int32),))),
    "a transposed adapter": lambda: operations.adapted_linear(X, Weight((WIDE,)), A.T, B, 1.0),
    "a half-precision adapter": lambda: operations.adapted_linear(X, Weight((WIDE,)), A.astype(mx.float16), B, 1.0),
    "another group size": lambda: operations.linear(X, Weight(packed, 4, 64)),
    "other bits": lambda: operations.linear(X, Weight(packed, 8, 32)),
    "no biases": lambda: operations.linear(X, Weight(packed[:2], 4, 32)),
    "scales of another dtype": lambda: operations.linear(
        X, Weight((packed[0], packed[1].astype(mx.float16), packed[2]), 4, 32)
    ),
    "a norm of half precision": lambda: operations.rms_norm(half, X[0], 1e-5),
    "a norm's weight that is too short": lambda: operations.rms_norm(X, X[0, :5], 1e-5),
    "a rotation of more than there is": lambda: operations.rotated(Q[..., :15], ANGLES, ANGLES, False),
    "angles of fewer tokens": lambda: operations.rotated(Q, ANGLES[:, 1:], ANGLES[:, 1:], False),
    "half-precision queries": lambda: operations.attention(Q.astype(mx.float16), K, V, 0.2, SEGMENTS),
    "fewer keys than segments": lambda: operations.attention(Q, K[:, :, 1:], V[:, :, 1:], 0.2, SEGMENTS),
    "fewer queries than segments": lambda: operations.attention(Q[:, :, 1:], K, V, 0.2, SEGMENTS),
    "queries in no segment": lambda: operations.attention(Q, K, V, 0.2, SEGMENTS[:-1]),
    "heads that do not share evenly": lambda: operations.attention(Q[:, :3], K, V, 0.2, SEGMENTS),
    "values for other keys": lambda: operations.attention(Q, K, V[:, :, 1:], 0.2, SEGMENTS),
    "a gate of another shape": lambda: operations.silu_gate(X, X[:1]),
    "gelu of half precision": lambda: operations.gelu(half),
    "half-precision states": lambda: operations.target_scores(half, TARGETS, Weight((WIDE,)), True),
    "fewer targets": lambda: operations.target_scores(X, TARGETS[1:], Weight((WIDE,)), True),
    "targets of 64 bits": lambda: operations.target_scores(X, TARGETS.astype(mx.int64), Weight((WIDE,)), True),
}


@pytest.mark.parametrize("arrays", REFUSED)
def test_arrays_that_an_operation_would_misread_are_refused(arrays: str) -> None:
    with pytest.raises(ValueError, match="shapes and dtypes"):
        mx.eval(REFUSED[arrays]())
