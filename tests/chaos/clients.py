"""Clients that know which picture is theirs, and the account of what became of their jobs."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

from tests.chaos.fleet import Fleet
from tests.service.support import check_answer

ANSWER_WITHIN_S = 90.0
PAUSE_S = 0.1
AGAIN = (503,)


@dataclass
class Account:
    """What was sent and what came back. ``ids`` are the jobs, by client number; ``refused`` counts error codes."""

    sent: int = 0
    answered: int = 0
    wrong: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    ids: dict[int, str] = field(default_factory=dict)
    refusal_s: list[float] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.sent - self.answered - sum(self.refused.values())


class Clients:
    """Some threads that ask for pictures; each request has an Idempotency-Key and is sent again while that helps."""

    def __init__(self, urls: Sequence[str], seed: int, threads: int = 8, patient: bool = True) -> None:
        self.account = Account()
        self._urls = urls
        self._random = random.Random(seed)
        self._patient = patient
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads)
        self._http = httpx.Client(trust_env=False, timeout=ANSWER_WITHIN_S, limits=httpx.Limits(max_connections=None))
        self._asked: list[Future[None]] = []

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._http.close()

    def send(self, count: int, word: str = "fake:sleep=0.05", **fields: object) -> None:
        """Ask for so many jobs of 1 or 2 images each."""
        for _ in range(count):
            number, images = self.account.sent, self._random.choice((1, 1, 2))
            self.account.sent += 1
            self._asked.append(self._pool.submit(self._ask, number, f"{word} client {number}", images, fields))

    def settle(self) -> Account:
        """Wait for every answer."""
        for asked in self._asked:
            asked.result()
        return self.account

    def _ask(self, number: int, prompt: str, images: int, fields: dict[str, object]) -> None:
        seed, key = 10 * number, uuid.uuid4().hex
        body = {"prompt": prompt, "seed": seed, "n": images, **fields}
        deadline, turn = time.monotonic() + ANSWER_WITHIN_S, number
        while time.monotonic() < deadline:
            began = time.monotonic()
            try:
                url = self._urls[turn % len(self._urls)]
                answer = self._http.post(f"{url}/generate", json=body, headers={"Idempotency-Key": key})
            except httpx.HTTPError:
                turn += 1
                time.sleep(PAUSE_S)
                continue
            if self._patient and answer.status_code in AGAIN:
                time.sleep(PAUSE_S)
                continue
            return self._note(number, answer, prompt, list(range(seed, seed + images)), time.monotonic() - began)

    def _note(self, number: int, answer: httpx.Response, prompt: str, seeds: list[int], seconds: float) -> None:
        body = answer.json()
        wrong = False
        if answer.status_code == 200:
            try:
                check_answer(body, prompt, seeds)
            except AssertionError:
                wrong = True
        with self._lock:
            if answer.status_code == 200:
                self.account.answered += 1
                self.account.wrong += wrong
                self.account.ids[number] = body["id"]
            else:
                self.account.refused[body["error"]["code"]] += 1
                self.account.refusal_s.append(seconds)


def repeated(fleet: Fleet, account: Account) -> int:
    """How often more than once the jobs were given to a worker, all in all."""
    return sum(int(fleet.job(id)["attempts"]) - 1 for id in account.ids.values())


def executed_twice(fleet: Fleet, account: Account) -> int:
    """How many of the jobs were given to a worker more than once."""
    return sum(int(fleet.job(id).get("attempts", 1)) > 1 for id in account.ids.values())
