"""A judge: any server of the OpenAI protocol's chat completions, asked by several threads."""
import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed

from ..config import said
from .run import bar

TRIES, WAIT = 6, 2.0  # of a question that is refused for now; seconds before the second, doubled each time
FAILED = "$ERROR$"  # FastChat's judgment of a question that was not judged
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)


class JudgeError(ValueError):
    """The judge cannot be asked: down, wrong address or key, busy for too long."""


class Judge:
    """name: the model that the server is asked for; url: …/v1, default $OPENAI_BASE_URL, else OpenAI's; the key is $OPENAI_API_KEY."""

    def __init__(self, name, url=None, timeout=300.0, wait=None):
        self.name, self.timeout, self.wait = name, timeout, WAIT if wait is None else wait
        self.url = (url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").rstrip("/")

    def ask(self, messages, temperature=0.0, max_tokens=2048):
        """The answer's text; FAILED where the question is longer than the judge reads. It waits and asks again while the judge is busy, at least as
        long as Retry-After says. JudgeError, one sentence."""
        body = json.dumps({"model": self.name, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            try:
                request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    content = json.load(response)["choices"][0]["message"]["content"]
                return content if isinstance(content, str) else ""
            except urllib.error.HTTPError as error:
                if error.code not in BUSY or last:
                    detail = " ".join(error.read(300).decode(errors="replace").split())
                    if error.code in (400, 413) and "context" in detail:
                        return FAILED
                    raise JudgeError(f"the judge at {self.url} refuses: {error.code} {error.reason} {detail}".rstrip()) from None
                wait = max(self.wait * 2**attempt, _seconds(error.headers.get("Retry-After")))
            except (OSError, ValueError, LookupError, TypeError) as error:  # no connection, or no JSON of the protocol
                if last or isinstance(getattr(error, "reason", None), ConnectionRefusedError):
                    raise JudgeError(f"the judge at {self.url} cannot be asked: {said(getattr(error, 'reason', None) or error)}") from None
                wait = self.wait * 2**attempt
            time.sleep(min(wait, 60))

    def ask_all(self, questions, done, parallel=8, progress=None):
        """Asks [(key, messages)], and calls done(key, text) for each answer in this thread, as it comes. JudgeError: the first failure, after
        what was under way; what has come is done."""
        failed = []

        def answer(key, messages):
            try:
                return key, None if failed else self.ask(messages)
            except JudgeError as error:
                failed.append(error)
                return key, None
        with ThreadPoolExecutor(parallel) as pool, bar("judgments", len(questions), progress=progress) as shown:
            try:
                for future in as_completed([pool.submit(answer, *one) for one in questions]):
                    key, text = future.result()
                    if text is not None:
                        done(key, text)
                        shown.update()
            except BaseException as error:  # Ctrl-C, a full disk: nothing more is asked
                failed.append(error)
                raise
        if failed:
            raise JudgeError(f"{failed[0]}; what it has judged is kept, and the same call goes on")


def _seconds(text):
    try:
        return float(text)
    except (TypeError, ValueError):  # absent, or a date
        return 0.0
