"""`lmtrain launch`: look the hosts over, start the ranks, and start them again when a host or a rank was lost."""

from __future__ import annotations

import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from lmtrain.checkpoint import Checkpoints
from lmtrain.checkpoint.names import Saved
from lmtrain.checkpoint.reader import faults
from lmtrain.config import read_yaml
from lmtrain.data.remote import is_url, local
from lmtrain.errors import EXIT_STOPPED, CheckpointError, ConfigError, EngineError
from lmtrain.follower import scrub
from lmtrain.launch import checks, command, hostfile, probe, variables
from lmtrain.launch.hostfile import Host
from lmtrain.launch.job import Job
from lmtrain.launch.ssh import Answer, Reach, is_here
from lmtrain.runfolder import CHECKPOINTS, CONFIG
from lmtrain.schema import RunConfig, load, need_train
from lmtrain.stopping import STOP_FILE
from lmtrain.train import Progress

NOT_MENDED = frozenset({2, 3, 4, 6, 7})
"""Exit codes that another start would give again: config, corpus, checkpoint, divergence, argument."""
_GRACE = 5.0
"""Seconds that processes of an attempt may take to end by themselves, after its launcher has."""
_LOOK = 0.2
PAUSE = 2.0
"""Seconds before the first restart; each further one waits twice as long, a minute at most."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asked for."""

    config: Path
    overrides: tuple[str, ...]
    hostfile: Path
    include: str = ""
    exclude: str = ""
    interface: str | None = None
    port: int | None = None
    ssh_port: int | None = None
    ssh_config: Path | None = None
    restarts: int = 0
    check_only: bool = False
    program: str | None = None


def say(text: str) -> None:
    """A line for the person at the terminal, if that is still there."""
    with suppress(OSError):
        print(f"lmtrain launch: {text}", file=sys.stderr, flush=True)


def launch(wish: Wish, *, environment: Mapping[str, str]) -> int:
    """Start a training job on the hosts of a hostfile and see it to its end. Returns the exit code.

    Raises InputError (hostfile, argument, variable), ConfigError, EngineError (hosts that are not fit).
    """
    hosts = hostfile.choose(hostfile.read(wish.hostfile), include=wish.include, exclude=wish.exclude)
    sorted_variables = variables.sort(environment, file=variables.read_files(environment, Path.cwd()))
    config = load(wish.config, wish.overrides, environment=environment)
    need_train(config)
    config.data.layout(_ranks(hosts))
    reach = Reach(environment=sorted_variables.own, here=is_here(hosts), config=wish.ssh_config, port=wish.ssh_port)
    program = wish.program or command.deepspeed(environment)
    return Launch(wish, hosts, config=config, reach=reach, given=sorted_variables, program=program).run()


def _ranks(hosts: Sequence[Host]) -> int:
    return sum(len(host.slots) for host in hosts)


class Launch:
    """The attempts of one launch, all in one run folder."""

    def __init__(
        self,
        wish: Wish,
        hosts: Sequence[Host],
        *,
        config: RunConfig,
        reach: Reach,
        given: variables.Variables,
        program: str,
    ) -> None:
        self.wish, self.hosts, self.config, self.reach, self.given = wish, list(hosts), config, reach, given
        self.program = program
        self.drawn = secrets.token_hex(16)
        self._signals = 0
        self._made_stop = False

    # ---- attempts ------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """All attempts. A run that was asked to stop, or that another start would not mend, is not started again."""
        code = 0
        with self._signals_caught():
            for attempt in range(self.wish.restarts + 1):
                if attempt and not self._pause(attempt):
                    return code
                try:
                    answers = self._look(left_out_ok=attempt > 0)
                    if self.wish.check_only:
                        return 0
                    code = self._attempt(answers, attempt)
                except EngineError as error:
                    if attempt in {0, self.wish.restarts} or self._signals:
                        raise
                    say(str(error))  # hosts that cannot be reached now may be back at the next attempt
                    code = error.exit_code
                finally:
                    self._sweep()
                if code == 0 and not self._finished():
                    say(f"the launcher says 0, but the run stands at step {self._step()}: it was ended from outside")
                    code = EngineError.exit_code
                if code in {0, EXIT_STOPPED} or self._signals or code in NOT_MENDED:
                    return code
                say(f"attempt {attempt + 1} of {self.wish.restarts + 1} ended with exit code {code}")
        return code

    def _pause(self, attempt: int) -> bool:
        """Wait before a restart; False when a signal came meanwhile."""
        until = time.monotonic() + min(60.0, PAUSE * 2.0 ** min(attempt - 1, 10))
        while not self._signals and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK))
        return not self._signals

    def _attempt(self, answers: Sequence[Answer], attempt: int) -> int:
        hosts = [answer.host for answer in answers]
        address = checks.rendezvous(answers, interface=self.wish.interface)
        assert answers[0].facts is not None
        config = str(self.wish.config)
        arguments = ["train", f"./{config}" if config.startswith("-") else config, *self.wish.overrides]
        if attempt and self.config.run.resume == "never":
            arguments.append("run.resume=auto")  # the folder was new when the launch began; now it is ours
        built = command.build(
            hosts,
            reach=self.reach,
            sorted_variables=self.given,
            folder=self.config.folder / command.FOLDER,
            arguments=arguments,
            address=address,
            port=self.wish.port or answers[0].facts["port"],
            drawn=self.drawn,
            interface=self.wish.interface,
            program=self.program,
        )
        where = f"{len(hosts)} host{'s' * (len(hosts) > 1)}, {_ranks(hosts)} ranks, from step {self._step()}"
        say(f"restart {attempt} of {self.wish.restarts}: {where}" if attempt else where)
        say(built.text)
        job = None
        try:
            if self.given.hidden:
                self._ask_all(hosts, {"do": "store", "private": self.given.hidden}, what="take the tokens and keys")
            job = Job(built, secrets=self.given.secrets)
            return self._wait(job)
        finally:
            if job is not None:
                job.kill()
            self._end(hosts, grace=0.0 if self._signals > 1 else _GRACE)
            if job is not None:
                job.drain(seconds=_GRACE)

    def _wait(self, job: Job) -> int:
        """Until the job ends. The first signal asks the ranks to save and stop, the second ends them."""
        asked = False
        while (code := job.wait(seconds=_LOOK)) is None:
            if self._signals > 1:
                say("ending the ranks now; the last checkpoint stays")
                return EngineError.exit_code
            if self._signals and not asked:
                asked = True
                say("asking the ranks to save and stop at the end of their step; once more ends them at once")
                (self.config.folder / STOP_FILE).touch()
                self._made_stop = True
        return code

    # ---- hosts ---------------------------------------------------------------------------------------------------

    def _look(self, *, left_out_ok: bool) -> list[Answer]:
        """The hosts that take part, looked over. left_out_ok: those that do not answer may be left out.

        Raises EngineError with all that is wrong, ConfigError when the global batch does not divide among the rest.
        """
        folder = self.config.folder / command.FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        (folder / probe.DRAWN_FILE).write_text(self.drawn + "\n", encoding="ascii")
        request = {**self._request(), "do": "look"}
        ours = probe.answer({**request, "ranks": 0}, environment={})
        answers = self.reach.ask(self.hosts, request)
        lost = [answer for answer in answers if not answer.reached]
        if lost and left_out_ok and len(lost) < len(answers):
            answers = [answer for answer in answers if answer.reached]
            names = ", ".join(answer.host.name for answer in lost)
            say(f"{names} does not answer and is left out")
            ranks = _ranks([answer.host for answer in answers])
            try:
                self.config.data.layout(ranks)
            except ConfigError as error:
                raise ConfigError(f"without {names} {ranks} ranks are left, and {error}") from None
        wrong = []
        for answer in answers:
            if answer.facts is None:
                verb = "cannot be reached over ssh" if not answer.reached else "could not be looked over"
                wrong.append(f"{answer.host.name} {verb}: {scrub(answer.trouble, self.given.secrets)}")
            else:
                wrong += [f"{answer.host.name} {text}" for text in checks.compare(ours, answer)]
        if wrong:
            raise EngineError(" | ".join(wrong))
        corpora, urls = self._corpora()
        same = (" and corpora" if corpora else "") + (f"; not compared, a URL: {', '.join(urls)}" if urls else "")
        say(f"looked over {len(answers)} host{'s' * (len(answers) > 1)}: same code, versions, config{same}")
        return answers

    def _corpora(self) -> tuple[list[str], list[str]]:
        """The folders of corpora, which hosts compare, and the URLs, whose manifests every rank checks itself."""
        corpus = self.config.data.corpus
        paths = [corpus] if isinstance(corpus, str) else [part.path for part in corpus]
        paths += [chosen.corpus for chosen in self.config.eval.sets.values() if chosen.corpus is not None]
        found = list(dict.fromkeys(local(str(path)) for path in paths))
        return [path for path in found if not is_url(path)], [path for path in found if is_url(path)]

    def _request(self) -> dict[str, Any]:
        return {
            "drawn": self.drawn,
            "folder": str(self.config.folder),
            "config": str(self.wish.config),
            "corpora": self._corpora()[0],
        }

    def _ask_all(self, hosts: Sequence[Host], request: Mapping[str, Any], *, what: str) -> None:
        for answer in self.reach.ask(hosts, {**self._request(), **request}):
            if answer.facts is None:
                raise EngineError(f"{answer.host.name} could not {what}: {scrub(answer.trouble, self.given.secrets)}")

    def _end(self, hosts: Sequence[Host], *, grace: float) -> None:
        """Nothing of this launch is left on its hosts; one that does not answer is told of."""
        for answer in replace(self.reach, timeout=30.0).ask(hosts, {**self._request(), "do": "end", "grace": grace}):
            if answer.facts is None:
                say(f"{answer.host.name} could not be asked to end its ranks: they end when they miss the others")
            elif answer.facts["ended"]:
                say(f"{answer.host.name}: ended {answer.facts['ended']} processes that were left")

    def _sweep(self) -> None:
        (self.config.folder / command.FOLDER / probe.DRAWN_FILE).unlink(missing_ok=True)
        if self._made_stop:
            (self.config.folder / STOP_FILE).unlink(missing_ok=True)

    # ---- where the run stands ------------------------------------------------------------------------------------

    def _newest(self) -> Saved | None:
        """The newest checkpoint whose manifest and sizes are right; the ranks read every byte."""
        saved = Checkpoints(self.config.folder / CHECKPOINTS, self.config.checkpoint).list()
        return next((one for one in reversed(saved) if not faults(one.path, contents=False)), None)

    def _step(self) -> int:
        newest = self._newest()
        return newest.step if newest else 0

    def _finished(self) -> bool:
        """Whether the newest checkpoint is one that training ends with: at its last step, or out of patience."""
        train, _ = need_train(self.config)
        try:
            step = self._step()
            if not step:
                return False
            newest = self._newest() if train.patience is not None else None
            if newest and train.out_of_patience(Progress(**newest.manifest().state["progress"])):
                return True
            return step >= (train.steps or train.length(self.config.data.global_batch * self._context()))
        except CheckpointError:
            return False

    def _context(self) -> int:
        """Symbols a row: as given, or as the run that saved found them."""
        return self.config.data.context or int(read_yaml(self.config.folder / CONFIG)["data"]["context"])

    @contextmanager
    def _signals_caught(self) -> Iterator[None]:
        def count(number: int, frame: FrameType | None) -> None:
            # a terminal that goes may hang up more than once; that is one wish to stop
            self._signals = max(self._signals, 1) if number == signal.SIGHUP else self._signals + 1

        names = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            names.append(signal.SIGHUP)
        before: dict[signal.Signals, Callable[..., Any] | int | None] = {n: signal.signal(n, count) for n in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, signal.SIG_DFL if handler is None else handler)
