"""
Processes that renew a token, forked from one that has imported everything.

Arguments: the URL of the database, and that of the OAuth server. Standard input has requests, one
JSON object a line; standard output an answer to each.

``{"key": …, "kill": ["before", 7]}`` calls `fresh` once in a process, which kills itself before or
after its 7th statement, or before ``["answer", 0]`` reaches `fresh`. The answer has its exit code
and what it found.

``{"key": …, "processes": 8, "rounds": 10}`` has processes that all call `fresh` once a round, for a
token that has just become due. The answer has the serials that they got, by round.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Engine, create_engine, event

from sqlalchemy_lucent import LucentBase, LucentError, RenewalAttempt, Renewals, SecretKey
from tests.oauth import OAuthError, refreshed

STATES = LucentBase.metadata.tables["lucent_secret_states"]


def expire(engine: Engine, key: SecretKey, left: float) -> None:
    """Have the secret expire in `left` seconds."""
    until = datetime.now(UTC) + timedelta(seconds=left)
    mine = (STATES.c[name] == part for name, part in key._asdict().items())
    with engine.begin() as connection:
        connection.execute(sa.update(STATES).where(*mine).values(expires_at=until))


def new_engine(url: str) -> Engine:
    sqlite = url.startswith("sqlite")
    return create_engine(url, pool_size=1, connect_args={"timeout": 60} if sqlite else {})


def renewed(url: str, value: Any) -> tuple[Any, timedelta]:
    tokens = refreshed(url, value["refresh_token"])
    return tokens, timedelta(seconds=tokens["expires_in"])


# -- one process -----------------------------------------------------------------------------------


def run_once(database: str, oauth: str, request: dict[str, Any]) -> dict[str, Any]:
    where, number = request.get("kill") or ("nowhere", 0)
    engine = new_engine(database)
    statements: list[str] = []
    attempts: list[dict[str, Any]] = []

    def kill_at(point: str) -> None:
        if (where, number) == (point, len(statements)):
            os.kill(os.getpid(), signal.SIGKILL)

    @event.listens_for(engine, "before_cursor_execute")
    def before(_: Any, cursor: Any, statement: str, *rest: Any) -> None:
        statements.append(statement)
        kill_at("before")

    @event.listens_for(engine, "after_cursor_execute")
    def after(*_: Any) -> None:
        kill_at("after")

    def refresh(value: Any, attempt: RenewalAttempt) -> tuple[Any, timedelta]:
        attempts.append({"number": attempt.number, "uncertain": attempt.uncertain})
        answer = renewed(oauth, value)
        if where == "answer":
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    found: dict[str, Any] = {"attempts": attempts}
    try:
        value = Renewals(engine).fresh(request["key"], refresh, wait=0.1)
        found["serial"] = value["serial"]
    except (OAuthError, LucentError) as error:
        found["error"] = type(error).__name__
    engine.dispose()
    return {**found, "statements": len(statements)}


def run_forked(database: str, oauth: str, request: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 1
        try:
            os.write(writing, json.dumps(run_once(database, oauth, request)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as output:
        said = output.read()
    _, status = os.waitpid(pid, 0)
    return {"exit": os.waitstatus_to_exitcode(status), **json.loads(said or b"{}")}


# -- many processes --------------------------------------------------------------------------------


def run_rounds(database: str, oauth: str, request: dict[str, Any]) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(request["processes"] + 1)
    queue = context.SimpleQueue()

    def work() -> None:
        engine = new_engine(database)
        renewals = Renewals(engine)
        serials: list[Any] = []
        for _ in range(request["rounds"]):
            barrier.wait()
            try:
                value = renewals.fresh(
                    request["key"], lambda value, _: renewed(oauth, value), wait=120, lease=120
                )
                serials.append(value["serial"])
            except BaseException as error:
                serials.append(f"{type(error).__name__}: {error}")
            barrier.wait()
        queue.put(serials)
        engine.dispose()

    processes = [context.Process(target=work) for _ in range(request["processes"])]
    for process in processes:
        process.start()
    engine = new_engine(database)
    for number in range(request["rounds"]):
        # By turns, a value that is due but good for a while, and one that is of no use any more.
        expire(engine, SecretKey.parse(request["key"]), 30 if number % 2 else -1)
        barrier.wait()
        barrier.wait()
    by_process = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    engine.dispose()
    return {"rounds": [list(each) for each in zip(*by_process, strict=True)]}


def main(database: str, oauth: str) -> None:
    engine = new_engine(database)  # imports what each process would import again
    Renewals(engine)
    engine.dispose()
    for line in sys.stdin:
        request = json.loads(line)
        run = run_rounds if "rounds" in request else run_forked
        print(json.dumps(run(database, oauth, request)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
