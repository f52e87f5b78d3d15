"""What each of locust's clients does in `serve.py`: ask, compare the answer with `predict`, at times send rubbish."""

import json
import os
import random
from pathlib import Path

from locust import FastHttpUser, task

FOLDER = Path(os.environ["SERVE_FOLDER"])
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
PICTURES = {path.name: path.read_bytes() for path in sorted((FOLDER / "pictures").iterdir())}
NAMES = list(EXPECTED)
RUBBISH = (b"", b"no picture", next(iter(PICTURES.values()))[:500])
CLOSE = 1e-4


class Client(FastHttpUser):
    """Asks again as soon as it has an answer."""

    @task
    def ask(self) -> None:
        """One picture for one adapter; a request in a hundred is broken."""
        adapter, picture = random.choice(NAMES), random.choice(list(PICTURES))
        broken = random.random() < 0.01
        body = random.choice(RUBBISH) if broken else PICTURES[picture]
        if broken and random.random() < 0.5:
            adapter, body = "nobody", PICTURES[picture]
        with self.client.post(
            f"/predict?adapter={adapter}&top=10",
            data=body,
            headers={"Content-Type": "image/jpeg"},
            name="broken" if broken else "good",
            catch_response=True,
        ) as reply:
            if broken:
                if 400 <= reply.status_code < 500:
                    reply.success()
                else:
                    reply.failure(f"status {reply.status_code}")
            elif reply.status_code == 429:
                reply.request_meta["name"] = "come again"
                reply.success()
            elif reply.status_code != 200:
                reply.failure(f"status {reply.status_code}: {reply.text[:200]}")
            else:
                (answer,) = reply.json()["answers"]
                found = {one["label"]: one["score"] for one in answer["classes"]}
                wanted = EXPECTED[adapter][picture]
                wrong = max(abs(found[f"class {i}"] - wanted[i]) for i in range(10))
                if answer["adapter"] != adapter or wrong > CLOSE:
                    reply.failure(f"a wrong answer: {answer['adapter']} for {adapter}, off by {wrong:.2g}")
                else:
                    reply.success()
