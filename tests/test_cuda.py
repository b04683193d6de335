"""What only a GPU can show, on `_cuda32` and `_cuda`: logits and gradients near the CPU's and transformers', training that repeats to
the bit, and failures that leave the process usable. Decoding, speculation and resumed runs: test_model.py, test_generate.py, test_train.py."""
import numpy as np
import pytest

import mambainllama as mil

pytestmark = pytest.mark.cuda
V = 97
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": V, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
          "max_position_embeddings": 512, "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": None}
# ||gpu - cpu|| / ||cpu||: float32 in another order; bf16 activations against float ones through four layers, and back.
LOGITS, GRADIENTS = {"float32": 1e-4, "bfloat16": 6e-2}, {"float32": 1e-3, "bfloat16": 0.15}


def hybrid(tied=False):
    model = mil.random(CONFIG | {"tie_word_embeddings": tied}, seed=3)
    return mil.convert(mil.convert(model, mamba_layers=[1], mixer="mamba2", seed=1), mamba_layers=[2], mixer="mamba1", seed=2) if tied else \
        mil.convert(model, mamba_layers=[1, 2], mixer="mamba2", seed=1)


def open_on(folder, dtype, device="cuda"):
    try:
        return mil.load(folder, device=device, dtype=dtype)
    except ValueError as error:
        if device == "cuda" and "device 'cuda'" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module", params=[(d, t) for d in ("float32", "bfloat16") for t in (False, True)], ids=lambda p: f"{p[0]}-{'mamba1' if p[1] else 'mamba2'}")
def pair(request, tmp_path_factory):
    """(on the GPU, the same on the CPU, dtype)"""
    dtype, tied = request.param
    folder = tmp_path_factory.mktemp("model")
    mil.save(hybrid(tied), folder)
    return open_on(folder, dtype), mil.load(folder, dtype=dtype), dtype


def error(a, b):
    assert np.isfinite(a).all()
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


def test_logits(pair):
    gpu, cpu, dtype = pair
    for T in (1, 7, 64, 129):
        assert error(gpu.logits(draw(2, T)), cpu.logits(draw(2, T))) < LOGITS[dtype], T


def test_gradients(pair):
    gpu, cpu, dtype = pair
    ids, targets = draw(2, 70), draw(2, 70, seed=1)
    targets[0, :20] = -100
    prev = np.tile(np.arange(70, dtype=np.int32) - 1, (2, 1))
    prev[1, 33] = -2
    for recompute in (False, True):
        for model in (gpu, cpu):
            model.trainable()
            model.zero_grad()
        ours, theirs = (m.loss(ids, targets, prev=prev, backward=True, recompute=recompute) for m in (gpu, cpu))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOGITS[dtype])
        for name in gpu.names:
            assert error(gpu.grad(name), cpu.grad(name)) < GRADIENTS[dtype], name


def test_training_has_the_same_bits_twice(pair, tmp_path):
    gpu, _, dtype = pair
    mil.save(gpu, tmp_path / "start")
    weights = []
    for run in range(2):
        teacher = open_on(tmp_path / "start", dtype)
        student = mil.convert(teacher, mamba_layers=[0], mixer="mamba2", seed=4)
        for step in range(3):
            losses = student.loss(draw(2, 40, seed=step), draw(2, 40, seed=step + 9), teacher=teacher, kl=1.0, ce=0.1, backward=True)
            norm = student.grad_norm()
            student.step(1e-3, scale=min(1.0, 1.0 / norm), step=step + 1)
            student.zero_grad()
        weights.append({name: student.raw(name) for name in student.names})
    assert np.isfinite(losses["loss"])
    assert all(weights[0][name].tobytes() == weights[1][name].tobytes() for name in weights[0])


def test_out_of_memory_names_the_request_and_leaves_the_process_usable(pair, tmp_path):
    gpu, _, dtype = pair
    with pytest.raises(MemoryError, match=r"^State: .*GiB asked for"):
        mil.State(gpu, 1 << 16, 1 << 20)
    with pytest.raises(MemoryError, match=r"^Model: .*GiB asked for"):
        mil.random(CONFIG | {"vocab_size": 1 << 24, "hidden_size": 1 << 20}, device="cuda", dtype=dtype)
    with open(tmp_path / "w", "wb") as file:
        file.truncate(1 << 39)  # a sparse file: 512 GiB of zeros that nobody reads
    w = np.memmap(tmp_path / "w", np.float32, "r", shape=(1 << 30, 128))
    with pytest.raises(MemoryError, match=r"^embedding_forward: .*512.00 GiB asked for"):
        gpu.module.embedding_forward(np.asarray(w), np.zeros((1, 1), np.int32))
    assert np.isfinite(gpu.logits(draw(1, 8), mil.State(gpu, 1, 8))).all()
    used, peak = gpu.module.memory()
    assert 0 < used <= peak


def test_a_failed_launch_names_op_kernel_and_place(pair):
    """A head of 70,001 numbers does not fit a multiprocessor's shared memory."""
    module = pair[0].module
    q, fits = (np.ones((1, 1, 1, P), np.float32) for P in (70001, 161))
    with pytest.raises(RuntimeError, match=r"^attention_forward: attend_plain \(attention\.cu:\d+\): "):
        module.attention_forward(q, q, q)
    assert (module.attention_forward(fits, fits, fits)[0] == 1).all()


@pytest.mark.parity
def test_logits_and_choices_equal_transformers(tmp_path):
    """float32 within 1e-4 of float32 transformers; bf16 as near to it as transformers' own bf16, and the same choice wherever that error
    leaves no doubt."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
                                      vocab_size=1000, max_position_embeddings=256, initializer_range=0.08)
    theirs = transformers.LlamaForCausalLM(config).eval()
    for p in theirs.parameters():
        p.data = p.data.to(torch.bfloat16).float()
    theirs.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 1000, (16, 64))
    with torch.no_grad():
        exact = theirs(torch.tensor(ids)).logits.numpy()
        halves = theirs.to(torch.bfloat16)(torch.tensor(ids)).logits.float().numpy()
    assert error(open_on(tmp_path, "float32").logits(ids), exact) < 1e-4
    ours = open_on(tmp_path, "bfloat16").logits(ids)
    rms, theirs_rms = (np.sqrt(np.mean((x - exact) ** 2)) for x in (ours, halves))
    assert rms <= 1.5 * theirs_rms
    best = np.sort(exact, -1)
    sure = best[..., -1] - best[..., -2] > 4 * rms
    assert sure.any() and (ours.argmax(-1) == exact.argmax(-1))[sure].all()
