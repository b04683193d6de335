"""answer: its lines are what generate gives row by row, whatever the batch, the shard and the restarts; and training data."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import mambainllama as mil
from mambainllama import data
from mambainllama.cli import main
from test_generate import V, models, spoken  # noqa: F401 (fixtures)

CHAT = [{"role": "user", "content": "why?"}]
ROWS = [{"messages": [*CHAT, {"role": "assistant", "content": "old"}]}, {"messages": CHAT}, {"prompt": "größe"},
        {"text": "once " * 9}, {"prompt": CHAT, "chosen": "a", "rejected": "b"}, {"tokens": [5, 6, 7]}, {"ids": [9] * 30},
        {"prompt": [1]}, {"prompt": "x"}]
PROMPTS = [CHAT, CHAT, "größe", "once " * 9, CHAT, [5, 6, 7], [9] * 30, [1], "x"]
HOW = {"greedy": {}, "sampled": dict(temperature=1.5, top_k=100, top_p=0.98, min_p=0.001, seed=7)}


def lines(path):
    return sorted(path.read_bytes().splitlines(keepends=True), key=lambda line: json.loads(line)["index"])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_answers_are_generate_s_row_by_row(spoken, tmp_path, how, batch):  # noqa: F811
    how = dict(max_new_tokens=60, **HOW[how])
    report = mil.answer(spoken, ROWS, tmp_path / "out", batch=batch, **how)
    rows = [json.loads(line) for line in lines(tmp_path / "out")]
    assert [row["index"] for row in rows] == list(range(len(ROWS))) and len({row["hash"] for row in rows}) == len(ROWS) - 2
    for i, (row, prompt) in enumerate(zip(rows, PROMPTS)):
        alone = mil.generate(spoken, [prompt], index=[i], **how)[0]
        assert (row["answer"], row["answer_ids"], row["finish"]) == (alone.text, alone.tokens, alone.finish)
        assert row["settings"] == {"max_new_tokens": 60, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0,
                                   "model": os.path.basename(spoken.folder)} | how
        ids = prompt if isinstance(prompt[0], int) else (
            spoken.tokenizer.encode_chat(prompt) if isinstance(prompt, list) else spoken.tokenizer.encode(prompt))
        if alone.finish == "stop" and prompt is CHAT:
            assert row["messages"] == [*CHAT, {"role": "assistant", "content": alone.text}]
        else:
            answer = alone.tokens + ([alone.end] if alone.finish == "stop" else [])
            assert row["ids"] == ids + answer and row["mask"] == [0] * len(ids) + [1] * len(answer)
            assert (alone.end in (257, 258)) == (alone.finish == "stop")
    together = mil.generate(spoken, PROMPTS, **how)
    assert [row["answer_ids"] for row in rows] == [row.tokens for row in together]
    assert report["rows"] == report["answered"] == len(ROWS)
    assert report["new_tokens"] == sum(len(row.tokens) for row in together) and report["tokens_per_second"] > 0
    if "seed" in how:
        assert {"stop", "length"} == {row["finish"] for row in rows} and any("messages" in row for row in rows)


def test_the_answers_are_training_data(spoken, tmp_path):  # noqa: F811
    mil.answer(spoken, ROWS, tmp_path / "out", max_new_tokens=60, **HOW["sampled"])
    documents = data.read(tmp_path / "out", spoken.tokenizer, V)
    for (ids, mask), line in zip(documents, (tmp_path / "out").read_bytes().splitlines()):
        row = json.loads(line)
        assert 0 < mask.sum() < len(ids)
        if "ids" in row:
            end = int(row["finish"] == "stop")
            assert ids[mask].tolist()[:mask.sum() - end] == row["answer_ids"] and mask.sum() == len(row["answer_ids"]) + end
    assert mil.train(spoken, tmp_path / "out", {"steps": 1, "length": 32, "batch": 2, "lr": 0.0})["steps"] == 1


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_it_goes_on_after_a_torn_line(spoken, tmp_path, kept):  # noqa: F811
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    how = dict(max_new_tokens=12, **HOW["sampled"])
    mil.answer(spoken, ROWS, whole, **how)
    written = whole.read_bytes().splitlines(keepends=True)
    for cut in (0, 1, 5, 40, len(written[kept]) - 1):
        torn.write_bytes(b"".join(written[:kept]) + written[kept][:cut])
        report = mil.answer(spoken, ROWS, torn, batch=2, **how)
        assert report["answered"] == len(ROWS) - kept and report["rows"] == len(ROWS)
        assert torn.read_bytes().splitlines(keepends=True)[:kept] == written[:kept] and lines(torn) == lines(whole)
    assert mil.answer(spoken, ROWS, torn, **how)["answered"] == 0 and lines(torn) == lines(whole)


@pytest.mark.parametrize("parts", [2, 4, 20])
def test_shards_together_are_the_whole(models, tmp_path, parts):  # noqa: F811
    rows, how = [{"ids": [i + 1] * (i % 5 + 1)} for i in range(13)], dict(max_new_tokens=6, **HOW["sampled"])
    mil.answer(models["hybrid1"], rows, tmp_path / "whole", **how)
    for part in range(parts):
        report = mil.answer(models["hybrid1"], rows, tmp_path / f"part{part}", shard=(part, parts), **how)
        assert report["rows"] == len(range(part, 13, parts)) == len(lines(tmp_path / f"part{part}"))
    joined = tmp_path / "joined"
    joined.write_bytes(b"".join((tmp_path / f"part{part}").read_bytes() for part in range(parts)))
    assert lines(joined) == lines(tmp_path / "whole")
    assert mil.answer(models["hybrid1"], rows, joined, **how)["answered"] == 0


def test_long_prompts_first(models, tmp_path):  # noqa: F811
    lengths = [3, 40, 1, 17, 40, 2]
    mil.answer(models["pure2"], [{"ids": [1] * n} for n in lengths], tmp_path / "out", batch=1, max_new_tokens=2)
    order = [json.loads(line)["index"] for line in (tmp_path / "out").read_bytes().splitlines()]
    assert order == sorted(range(6), key=lambda i: (-lengths[i], i))


@pytest.mark.parametrize("change, says", [
    (dict(seed=1), "other settings (seed 0)"), (dict(max_new_tokens=3, top_k=5), "(max_new_tokens 2, top_k 0)"),
    (dict(rows=[{"ids": [4]}, {"ids": [2]}]), "another row 0"), (dict(rows=[{"ids": [1]}]), "an answer to row 1"),
])
def test_another_run_s_file_is_left_alone(models, tmp_path, change, says):  # noqa: F811
    out = tmp_path / "out"
    call = dict(rows=[{"ids": [1]}, {"ids": [2]}], max_new_tokens=2)
    mil.answer(models["pure2"], out=out, **call)
    before = out.read_bytes()
    with pytest.raises(ValueError) as error:
        mil.answer(models["pure2"], out=out, **call | change)
    assert says in str(error.value) and str(out) in str(error.value) and out.read_bytes() == before


@pytest.mark.parametrize("content", [b'{"ids": [1]}', b'{"ids": [1]}\n', b"[]\n", b"notes", b'{"index": 0}\n', b'{"index": 0\n',
                                     b'{"index": 0, "hash": "", "settings": 1}\n', b'{"index": [], "hash": "", "settings": {}}\n'])
def test_a_file_of_another_kind_is_left_alone(models, tmp_path, content):  # noqa: F811
    (tmp_path / "out").write_bytes(content)
    with pytest.raises(ValueError, match="out:1: not an answer's line"):
        mil.answer(models["pure2"], [{"ids": [1]}], tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content


@pytest.mark.parametrize("row, says", [
    ("{", "not JSON"), ("[1]", "a row is an object"), ('{"a": 1}', "needs one of messages, prompt"),
    ('{"ids": [1], "text": "x"}', "needs one of"), ('{"messages": []}', "messages"),
    ('{"messages": [{"role": "user"}]}', "messages must be a list of objects"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "is empty"), ('{"prompt": 7}', "prompt must be a string, a list"),
    ('{"text": [1]}', "text must be a string"), ('{"ids": "x"}', "ids must be token ids"), ('{"ids": [1, 999]}', "holds 999"),
    ('{"ids": [1.5]}', "ids must be token ids"), ('{"prompt": ""}', "no tokens"), ('{"tokens": []}', "is empty"),
])
def test_a_bad_row_is_named_by_its_line(spoken, tmp_path, row, says):  # noqa: F811
    (tmp_path / "rows").write_text('{"ids": [1]}\n\n' + row + "\n")
    with pytest.raises(ValueError) as error:
        mil.answer(spoken, tmp_path / "rows", tmp_path / "out")
    assert str(error.value).startswith(f"{tmp_path / 'rows'}:3: ") and says in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how, says", [
    (dict(rows=[]), "no rows"), (dict(shard=(2, 2)), "shard"), (dict(shard=(-1, 2)), "shard"),
    (dict(temperature=-1), "temperature"), (dict(batch=0), "batch"),
    (dict(rows=[{"text": "x"}]), "rows row 0: the prompt is text"),
])
def test_bad_calls(models, tmp_path, how, says):  # noqa: F811
    with pytest.raises(ValueError, match=says):
        mil.answer(models["pure2"], **dict(rows=[{"ids": [1]}], out=tmp_path / "out") | how)
    assert not (tmp_path / "out").exists()


def folder_and_rows(spoken, tmp_path):  # noqa: F811
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [spoken.folder, "--prompts", str(tmp_path / "rows"), "--out", str(tmp_path / "out")]


def test_from_the_shell(capsys, spoken, tmp_path):  # noqa: F811
    args = ["generate", *folder_and_rows(spoken, tmp_path), "--max-new-tokens", "9", "--temperature", "0.5", "--seed", "3"]
    assert main([*args, "--shard", "1/2", "--batch", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "4 of 4 rows answered now, 36 tokens" in err and "tokens/s" in err
    assert main(args) == 0 and "5 of 9 rows answered now" in capsys.readouterr().err
    mil.answer(mil.load(spoken.folder), ROWS, tmp_path / "same", max_new_tokens=9, temperature=0.5, seed=3)
    assert lines(tmp_path / "out") == lines(tmp_path / "same")


@pytest.mark.parametrize("more", [["x"], ["--chat"], ["--json"], ["--stop", "x"], ["--draft", "x"], ["--file", "x"],
                                  ["--shard", "2/2"], ["--shard", "1"], ["--seed", "-1"]])
def test_refusals_of_the_shell(capsys, spoken, tmp_path, more):  # noqa: F811
    assert main(["generate", *folder_and_rows(spoken, tmp_path), *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert main(["generate", spoken.folder, "--prompts", "x"]) == 2 and "--out" in capsys.readouterr().err


def test_ctrl_c_leaves_whole_lines(spoken, tmp_path):  # noqa: F811
    args = folder_and_rows(spoken, tmp_path)
    with open(tmp_path / "rows", "a") as file:
        file.writelines(json.dumps({"ids": [1, 2, 3]}) + "\n" for _ in range(5000))
    with subprocess.Popen([sys.executable, "-P", "-m", "mambainllama", "generate", *args, "--max-new-tokens", "30"], text=True,
                          stderr=subprocess.PIPE) as process:
        out, deadline = tmp_path / "out", time.monotonic() + 60
        while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    done = len(lines(out))  # every line is JSON
    assert process.returncode == 130 and "Traceback" not in err and out.read_bytes().endswith(b"\n")
    assert 0 < done < 5009 and f"{done} of 5009 rows are answered" in err
