"""A paged KV cache whose old tokens are codes.

numpy decodes the codes that a state has, turns keys by their positions, and says what the model computes of
them and the rows. What would break these: codes of another slot, head or layer, keys that are turned by
another position, an old token that stays a row where blocks are short or a recent one that does not, room
that is promised and not there.
"""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest

import transform_files
from arch_models import ArchModel
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.added import write_with
from ggml_ext.runtime.cache_types import CacheTypes
from ggml_ext.runtime.llama import Model, log_lines
from kv_coded import CodedLayer, Parts, exact_codebooks, parts_of
from kv_context import Context
from kv_evicted import HEAD, KV_HEADS, different_tokens, three_sequences
from kv_paged import F16, Q4_0, Q8_0, open_cache, random_tokens, read

LAYERS = {bits: CodedLayer(bits) for bits in (2, 1)}
SINK, RECENT = 16, 64


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("cold")
    return {bits: layer.write_coded(folder / f"cq{bits}.gguf") for bits, layer in LAYERS.items()}


def _agrees(layer: CodedLayer, logits: np.ndarray, tokens: list[int], parts: Parts) -> None:
    """Within what q8_0 costs, which is much less than what codes do."""
    error = np.abs(logits - layer.logits_coded(tokens, parts)).max()
    whole = np.abs(logits - layer.logits(tokens, [list(range(len(tokens)))] * KV_HEADS)).max()
    assert error < 0.05 * np.abs(logits).max()
    if any(parts.coded):
        assert error < 0.3 * whole, (error, whole)


def _nearest(layer: CodedLayer, tokens: list[int], parts: Parts) -> None:
    """The codes are nearest words, but for what q8_0 moved."""
    for which, codes, x in (("k", parts.k, layer.unturned(tokens)), ("v", parts.v, layer.values(tokens))):
        for head, positions in enumerate(parts.coded):
            words = layer.books[which][head].rounded(layer.channels if which == "k" else 32)
            places = x[positions, head].reshape(len(positions), -1, layer.channels)
            distance = ((places[:, :, None] - words[None]) ** 2).sum(-1)
            mine = np.take_along_axis(distance, codes[head][..., None].astype(np.int64), 2)[..., 0]
            worse = mine - distance.min(-1)
            assert worse.mean() < 0.01 * mine.mean(), (which, head)


def _whole(parts: Parts, n: int) -> None:
    for old, rows in zip(parts.coded, parts.rows, strict=True):
        assert sorted(old + rows) == list(range(n))
        assert set(range(min(n, SINK))) | set(range(max(0, n - RECENT), n)) <= set(rows)


@pytest.mark.parametrize("bits", [2, 1])
@pytest.mark.parametrize(("ubatch", "prompt"), [(64, 700), (1, 300), (50, 333), (128, 640)])
def test_old_tokens_are_codes(coded: dict[int, Path], bits: int, ubatch: int, prompt: int) -> None:
    layer, tokens = LAYERS[bits], different_tokens(prompt + 70)
    kv = f"paged,cold=cq{bits}"
    with open_cache(coded[bits], kv, n_ctx=1024, ubatch=ubatch, batch=512, threads=1 + bits % 2) as context:
        logits = read(context, tokens[:prompt])
        for n in range(prompt, len(tokens)):
            if n > prompt:
                logits = context.decode([tokens[n - 1]], n - 1)
            if n in (prompt, prompt + 1, prompt + 30, prompt + 69):
                parts = parts_of(context.save(), layer.channels)
                assert len(parts.rows[0]) <= 64 * (2 + 1 + -(-ubatch // 64))
                _whole(parts, n)
                _agrees(layer, logits, tokens[:n], parts)
        _nearest(layer, tokens, parts)


def test_nothing_is_coded_while_rows_suffice(coded: dict[int, Path]) -> None:
    tokens = different_tokens(180)
    with open_cache(coded[2]) as plain, open_cache(coded[2], "paged,cold=cq2", ubatch=64) as context:
        logits = read(context, tokens)
        assert parts_of(context.save(), 4).coded == [[], []]
        # Without the rotation of the plain cache's rows.
        assert np.abs(logits - read(plain, tokens)).max() < 0.05 * np.abs(logits).max()


@pytest.mark.parametrize("unified", [False, True])
def test_several_sequences(coded: dict[int, Path], unified: bool) -> None:
    """Cuts are among codes, too."""
    with open_cache(coded[2], "paged,cold=cq2", n_ctx=2048, n_seq=3, unified=unified) as context:
        for sequence, tokens, logits in three_sequences(context, cuts=(20, 30, 40, 50)):
            parts = parts_of(context.save(sequence), 4)
            for old, rows in zip(parts.coded, parts.rows, strict=True):
                assert sorted(old + rows) == list(range(len(tokens)))
            _agrees(LAYERS[2], logits, tokens, parts)


def test_a_copy_over_other_tokens_is_left_out(coded: dict[int, Path]) -> None:
    """Also where one sequence has as codes what the other has as rows."""
    mine, other = different_tokens(200, 1), different_tokens(400, 2)
    logits = []
    for copies in (False, True):
        with open_cache(coded[2], "paged,cold=cq2", n_ctx=2048, n_seq=2, unified=True) as context:
            read(context, other, sequence=1)
            read(context, mine)
            rows, codes = parts_of(context.save(), 4).rows[0], parts_of(context.save(1), 4).coded[0]
            assert set(rows[-20:]) <= set(codes)
            for source, target in ((1, 0), (0, 1)) if copies else ():
                context.copy(source, target, rows[-20], rows[-1] + 1)
                assert any("cannot copy positions" in line for line in log_lines())
            logits.append([read(context, [5], len(mine)), read(context, [5], len(other), 1)])
    assert np.array_equal(*logits)


def test_learned_transforms_of_the_cache_are_off(coded: dict[int, Path], tmp_path: Path) -> None:
    """They change rows that are not coded as well, so any that is left shows in the last bit."""
    model = transform_files.transform_heads(transform_files.read(LAYERS[2].write(tmp_path / "l.gguf")), HEAD)
    transformed = tmp_path / "coded.gguf"
    write_with(model.write(tmp_path / "heads.gguf"), LAYERS[2].codebook_tensors(), transformed)
    paths = coded[2], transformed
    tokens = different_tokens(400)
    found = []
    for kv in ("paged,cold=cq2", "paged"):
        for path in paths:
            with open_cache(path, kv, n_ctx=1024) as context:
                found.append(read(context, tokens))
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[2], found[3])


def test_a_context_is_filled_to_its_last_cell(coded: dict[int, Path]) -> None:
    with open_cache(coded[1], "paged,cold=cq1", n_ctx=512, n_seq=2, unified=True) as context:
        read(context, different_tokens(300))
        read(context, different_tokens(212, 1), sequence=1)
        assert context.try_decode([(1, 300, 0)]) == 1
        assert context.remove(1, 0)
        read(context, different_tokens(212, 2), 300)


def test_rows_are_few_and_codes_small(coded: dict[int, Path]) -> None:
    """Bytes as docs/kv-cache.md has them: 2 heads of 32."""
    rows, codes = 256 + 2 * 64 * 34, 256 + 2 * 64 * 8
    with open_cache(coded[2], "paged,cold=cq2", n_ctx=8192) as context:
        line = next(line for line in context.log if "ggml-ext: paged:" in line)
        blocks = 3  # sinks, recent tokens and a ubatch of 64
        assert f"{blocks} blocks of 64 tokens and {8192 // 64 + 2} of 64 codes of 2 bits" in line
        assert f"{2 * (blocks * rows + (8192 // 64 + 2) * codes) / 2**20:.2f} MiB" in line
    with open_cache(coded[2], "paged,budget=512K,cold=cq2", n_ctx=8192) as context:
        line = next(line for line in context.log if "ggml-ext: paged:" in line)
        assert float(line.split("paged: ")[1].split()[0]) <= 0.5


def test_a_budget_is_kept(coded: dict[int, Path]) -> None:
    with open_cache(coded[2], "paged,budget=512,cold=cq2", n_ctx=2048, batch=64) as context:
        tokens = different_tokens(1000)
        done = 0
        status = 0
        while status == 0 and done < 960:
            some = enumerate(tokens[done : done + 64], done)
            status = context.try_decode([(token, position, 0) for position, token in some])
            done += 64 * (status == 0)
        assert status == 1
        assert 512 <= done < 900
        parts = parts_of(context.save(), 4)
        _whole(parts, done)
        assert context.remove(0, 100)
        read(context, tokens[100:400], 100)


@pytest.mark.parametrize("policy", ["norm", "random"])
def test_eviction_takes_codes(coded: dict[int, Path], policy: str) -> None:
    layer, tokens = LAYERS[2], different_tokens(1000)
    kv = f"paged,budget=512,policy={policy},cold=cq2"
    with open_cache(coded[2], kv, n_ctx=2048, batch=64) as context:
        logits = read(context, tokens)
        parts = parts_of(context.save(), 4, scored=policy == "norm")
        norms = (layer.keys(tokens) ** 2).sum(-1)
        for head, (old, rows) in enumerate(zip(parts.coded, parts.rows, strict=True)):
            assert not set(old) & set(rows)
            assert 400 < len(old) <= 512 + 128
            assert set(range(SINK)) | set(range(len(tokens) - RECENT, len(tokens))) <= set(rows)
            if policy == "norm":
                gone = sorted(set(range(len(tokens))) - set(old) - set(rows))
                assert norms[gone, head].min() > np.median(norms[old, head])
        _agrees(layer, logits, tokens, parts)


@pytest.mark.parametrize(("ubatch", "rows", "more"), [(48, 2, 0), (1, 2, 0), (17, 3, 20), (48, 4, 100)])
def test_a_lone_sequence_leaves_no_block_open(
    coded: dict[int, Path], ubatch: int, rows: int, more: int
) -> None:
    """Sinks, recent tokens and room for a ubatch, 48 at least, are all the rows there are, and of the codes'
    blocks no more than that room is empty; also behind cuts among codes."""
    layer, tokens, n_codes = LAYERS[2], different_tokens(1010), 6
    size = 2 * (rows * (256 + 2 * 64 * 34 + 256) + n_codes * (256 + 2 * 64 * 8 + 256))
    kv = f"paged,budget={-(-size // 1024)}K,policy=norm,cold=cq2,recent={RECENT + more}"
    with open_cache(coded[2], kv, n_ctx=2048, ubatch=ubatch) as context:
        assert any(f"{rows} blocks of 64 tokens and {n_codes} of 64 codes" in line for line in context.log)
        done = 0
        for end in (700, 900, 1000):
            read(context, tokens[done:end], done)
            for done in range(end, end + 10):
                logits = context.decode([tokens[done]], done)
            done += 1
            parts = parts_of(context.save(), 4, scored=True)
            for old, held in zip(parts.coded, parts.rows, strict=True):
                assert len(held) <= 64 * rows
                assert set(range(SINK)) | set(range(done - RECENT - more, done)) <= set(held)
                assert not set(old) & set(held)
            assert sum(len(old) for old in parts.coded) > KV_HEADS * (64 * n_codes - 2 * 48)
            _agrees(layer, logits, tokens[:done], parts)
            if end < 1000:
                done -= 110 + more
                assert context.remove(0, done)


def test_the_smallest_budget_of_rows(coded: dict[int, Path]) -> None:
    with open_cache(coded[2], "paged,budget=128,policy=norm", n_ctx=2048, ubatch=48) as context:
        assert any("2 blocks of 64 tokens" in line for line in context.log)
        tokens = different_tokens(400)
        read(context, tokens)
        for position in range(100):
            context.decode([tokens[position]], 400 + position)


@pytest.mark.parametrize("policy", ["", ",policy=norm"])
def test_states(coded: dict[int, Path], policy: str) -> None:
    tokens, kv = different_tokens(501), f"paged{policy},cold=cq2"
    with open_cache(coded[2], kv, n_ctx=1024) as context:
        read(context, tokens[:500])
        state = context.save()
        logits = context.decode(tokens[500:], 500)
    with open_cache(coded[2], kv, n_ctx=1024, n_seq=2, unified=True) as context:
        read(context, different_tokens(300, 7), sequence=1)
        assert context.restore(state)
        assert context.save() == state
        again = context.decode(tokens[500:], 500)
        assert np.abs(again - logits).max() < 2e-3 * np.abs(logits).max()
        for damaged in (state[:-5], state.replace(b"GGXC", b"GGXE")):
            assert not context.restore(damaged)
    other_policy = "paged,cold=cq2" if policy else "paged,policy=norm,cold=cq2"
    for other in ("paged", "paged,policy=random", other_policy):
        with open_cache(coded[2], other, n_ctx=1024) as context:
            assert not context.restore(state)
            assert not np.isnan(read(context, tokens[:64])).any()
    with open_cache(coded[2], "off", n_ctx=1024) as context:
        assert not context.restore(state)


def test_a_state_that_has_a_cell_twice_is_refused(coded: dict[int, Path]) -> None:
    with open_cache(coded[2], "paged,cold=cq2", n_ctx=1024) as context:
        read(context, different_tokens(500))
        state = bytearray(context.save())
        at = state.index(b"GGXC") + 16
        n = int.from_bytes(state[at : at + 4], "little")
        assert n > 100
        first = state[at + 4 : at + 8]
        last = (int.from_bytes(first, "little") - 1).to_bytes(4, "little")  # a sink's
        state[at + 4 : at + 8] = last
        assert not context.restore(bytes(state))
        assert any("as rows and as codes" in line for line in log_lines())


@pytest.mark.parametrize(
    "name",
    [
        "llama-dense",
        "gemma3-dense",
        "gpt-oss-moe",
        "falcon-h1-dense",
        "bloom-dense",
        "gptneox-dense",
        "qwen3-dense",
        "phi3-dense",
    ],
)
def test_words_that_tokens_have_lose_nothing(
    architectures: dict[str, ArchModel], tmp_path: Path, name: str
) -> None:
    """What the fit takes for a key before RoPE is what the cache codes, in every form that graphs have: where
    it is not, no word is near. Words of another place show that either would be seen."""
    model, tokens = _sharp(architectures[name].path, tmp_path / "sharp.gguf"), random_tokens(336)
    rows = np.arange(SINK, SINK + 256)
    coded = exact_codebooks(model, [*tokens, *random_tokens(130, 1)], rows, tmp_path / "coded.gguf")
    options = {"n_ctx": 512, "batch": 64}
    with open_cache(model, "paged", **options) as plain:
        wanted = read(plain, tokens)
    errors = []
    for path in (coded, *(_other_places(coded, which, tmp_path / f"{which}.gguf") for which in "kv")):
        with open_cache(path, "paged,cold=cq2", **options) as context:
            errors.append(np.abs(read(context, tokens) - wanted).max() / np.abs(wanted).max())
    exact, other_k, other_v = errors
    assert exact < 0.01
    assert exact < 0.5 * other_k
    assert exact < 0.1 * other_v


def _sharp(path: Path, out: Path) -> Path:
    """The model with larger keys and queries: a tiny random one looks at all tokens alike."""
    tensors = gguf.GGUFReader(path).tensors
    found = [
        [t for t in tensors if re.search(rf"attn_({which})\.weight", t.name)]
        for which in ("q_norm|k_norm", "q|k|qkv")
    ]
    write_with(path, {t.name: 8 * np.asarray(t.data, np.float32) for t in found[0] or found[1]}, out)
    return out


def _other_places(coded: Path, which: str, out: Path) -> Path:
    """K's or V's codebooks, each of the place in front."""
    books = {
        tensor.name: np.roll(
            np.asarray(tensor.data).view(np.float16).reshape([int(n) for n in reversed(tensor.shape)]),
            1,
            axis=-3,
        )
        for tensor in gguf.GGUFReader(coded).tensors
        if f"attn_{which}.kv_cq2" in tensor.name
    }
    write_with(coded, books, out)
    return out


@pytest.mark.parametrize(
    ("kv", "types", "reason"),
    [
        ("paged,cold=cq1", (Q8_0, Q8_0), "no codebooks of 1 bit of layer 0"),
        ("paged,cold=cq2", (F16, F16), "take -ctk q8_0 -ctv q8_0"),
        ("paged,cold=cq2", (Q8_0, Q4_0), "take -ctk q8_0 -ctv q8_0"),
        ("paged,policy=attention,cold=cq2", (Q8_0, Q8_0), "no scores of policy attention"),
        ("paged,budget=10%,cold=cq2", (Q8_0, Q8_0), "blocks of 64 coded tokens beside"),
        ("paged,cold=cq3", (Q8_0, Q8_0), "is 'paged,cold=cq3'; set it to"),
        ("cold=cq2", (Q8_0, Q8_0), "is 'cold=cq2'; set it to"),
        ("budget=25%,cold=cq2", (Q8_0, Q8_0), "set it to"),
    ],
)
def test_refused_by_name(coded: dict[int, Path], kv: str, types: tuple[int, int], reason: str) -> None:
    context = Context(coded[2], kv=kv, types=types, flash=True, n_ctx=1024)
    assert context.context == 0 or not context.context
    assert any(reason in line for line in context.log), context.log


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"k": np.zeros((KV_HEADS, HEAD // 4, 256, 4), np.float32)}, "is of type f32, not f16"),
        ({"k": np.zeros((KV_HEADS, HEAD // 4, 255, 4), np.float16)}, "which is not 4 x 256 x 8 x 2"),
        ({"v": np.zeros((1, HEAD // 4, 256, 4), np.float16)}, "which is not 4 x 256 x 8 x 2"),
        ({"v": np.zeros(0, np.float16)}, "attn_v.kv_cq2' is missing"),
        ({"v": np.full((KV_HEADS, HEAD // 4, 256, 4), np.inf, np.float16)}, "not finite"),
    ],
)
def test_malformed_codebooks(tmp_path: Path, changed: dict[str, np.ndarray], reason: str) -> None:
    path = LAYERS[2].write_coded(tmp_path / "bad.gguf", **changed)
    with pytest.raises(GgmlExtError, match="cannot load it"):
        Model(path)
    assert any(reason in line for line in log_lines())


def test_stock_llama_refuses_codebooks(coded: dict[int, Path], stock_build: Path, tmp_path: Path) -> None:
    result = transform_files.run(stock_build, coded[2], tmp_path / "logits.npy")
    assert result.returncode != 0
    assert "wrong number of tensors" in result.stderr


def test_option() -> None:
    assert CacheTypes.of("q8_0", "q8_0", "paged,cold=cq2").setting == "paged,cold=cq2"
    assert CacheTypes.of("q8_0", "q8_0", "paged,25%,policy=probe,cold=cq1,sink=4").setting == (
        "paged,budget=25%,policy=probe,cold=cq1,sink=4"
    )
    assert CacheTypes.of("q8_0", "q8_0", "paged,cold=cq2").ubatch(512) == 48
    for wrong in ("cold=cq2", "25%,cold=cq2", "paged,cold=cq4", "paged,cold=cq2,policy=norm"):
        with pytest.raises(GgmlExtError, match="no budget"):
            CacheTypes.of("q8_0", "q8_0", wrong)
