"""Hostfiles, arguments and variables that would run something on the way: refused, or arriving as they were."""

import contextlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.errors import EngineError, InputError
from lmtrain.launch import hostfile, private, shell, variables
from lmtrain.launch.hostfile import Host

HOSTILE_HOSTS = [
    "-oProxyCommand=touch${IFS}pwned",
    "-Fpwned",
    "--help",
    "a;touch_pwned",
    "$(touch${IFS}pwned)",
    "`touch${IFS}pwned`",
    "a|touch",
    "a&touch",
    "a>pwned",
    "a,b",
    "node[1-9]",
    "^pwned",
    "/node/",
    "exec:node",
    "user@node",
    "node:0",
    "fe80::1",
    "node%h",
    "node'x",
    'node"x',
    "node\\x",
    "~root",
    "..",
    "a..b",
    ".a",
    "a-",
    "a" * 64,
    "a." * 130 + "a",
    "nöde",
    "node\x1b[2J",
    "node\x00x",
    "*",
    "!node",
    "{a,b}",
    "(a)",
    "#a\u2028evil",
]


@pytest.mark.parametrize("name", HOSTILE_HOSTS[:-1])
def test_no_hostile_host(tmp_path, name):
    assert not hostfile.is_name(name)
    path = tmp_path / "hosts"
    path.write_text(f"good slots=1\n{name} slots=1\n")
    with pytest.raises(InputError, match="line 2: "):
        hostfile.read(path)


@pytest.mark.parametrize("slots", ["0", "65", "-1", "1;touch", "1e3", "٣", "9" * 5000, "", "1 slots=2x", "$(id)"])
def test_no_hostile_slots(tmp_path, slots):
    path = tmp_path / "hosts"
    path.write_text(f"good slots={slots}\n" if " " not in slots else f"good {slots}\n")
    with pytest.raises(InputError, match="line 1: "):
        hostfile.read(path)


def test_a_line_ends_where_the_launcher_ends_it(tmp_path):
    """Python knows more ends of line than the launcher: a comment of its must not be a host of ours."""
    path = tmp_path / "hosts"
    path.write_text("a slots=2\n#a\u2028evil slots=1\n# x\x0bevil slots=1\n\n  b.example.org   slots=64 # note\n")
    assert hostfile.read(path) == [Host("a", (0, 1)), Host("b.example.org", tuple(range(64)))]


def test_what_is_read_is_what_deepspeed_reads(tmp_path):
    from deepspeed.launcher.runner import _parse_hostfile, parse_inclusion_exclusion

    text = "w-0 slots=4\n\n# c\nw1.x  slots=2\n10.0.0.3\tslots=3\n"
    path = tmp_path / "hosts"
    path.write_text(text)
    hosts = hostfile.read(path)
    theirs = _parse_hostfile(text.splitlines())
    assert {host.name: len(host.slots) for host in hosts} == dict(theirs)
    for include, exclude in [
        ("w-0", ""), ("w1.x@w-0:3,1", ""), ("10.0.0.3:0,2@10.0.0.3:1", ""), ("", "w-0"), ("", "w-0:0,1@w1.x"), ("", ""),
    ]:  # fmt: skip
        wanted = parse_inclusion_exclusion(theirs, include, exclude)
        ours = hostfile.choose(hosts, include=include, exclude=exclude)
        assert [(host.name, list(host.slots)) for host in ours] == [(k, sorted(v)) for k, v in wanted.items()]
        again = parse_inclusion_exclusion(
            _parse_hostfile(hostfile.text_of(ours).splitlines()), hostfile.include_of(ours), ""
        )
        assert [(host.name, list(host.slots)) for host in ours] == list(again.items())


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("a", "b", "both given"),
        ("c", "", "names 'c', which is not in the hostfile"),
        ("a:9", "", "a has the slots 0..1"),
        ("a:0;touch", "", "wanted NAME:SLOT"),
        ("-oProxyCommand=x", "", "not in the hostfile"),
        ("", "a@b", "leaves no slot"),
    ],
)
def test_bad_choices(include, exclude, message):
    with pytest.raises(InputError, match=message):
        hostfile.choose([Host("a", (0, 1)), Host("b", (0,))], include=include, exclude=exclude)


def over_pdsh(arguments: list[str], exports: dict[str, str], tmp_path: Path) -> dict:
    """What a program on another host is given: DeepSpeed's own runner makes the line, a shell reads it."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    given = Namespace(
        user_args=arguments, user_script="lmtrain", ssh_port=None, launcher_args="", master_addr="a", master_port=1,
        venv_script=None, no_python=False, module=True, no_local_rank=False, save_pid=False,
        enable_each_rank_log="None",
    )  # fmt: skip
    runner = PDSHRunner(given, "e30=")
    for name, value in exports.items():
        runner.add_export(name, value)
    with contextlib.chdir(tmp_path):
        command, _, _ = runner.get_cmd({}, {"a": [0], "b": [0]})
    at = next(i for i, text in enumerate(command) if text.startswith("cd "))
    out = tmp_path / "out.json"
    say = "import json, os, sys; out = sys.argv.pop(1); json.dump([sys.argv[1:], dict(os.environ)], open(out, 'w'))"
    (tmp_path / "say.py").write_text(say)
    # pdsh joins the words, ssh hands the line to the shell; only the program is another.
    words = " ".join([*command[6:at], command[at], sys.executable, str(tmp_path / "say.py"), str(out)])
    line = words + " " + " ".join(command[command.index("lmtrain") + 1 :])
    subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, check=True, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    )
    argv, environment = json.loads(out.read_text())
    return {"argv": argv, "environment": environment}


HOSTILE_ARGUMENTS = [
    "run.name=$(touch pwned)",
    "run.name=$(touch${IFS}pwned)",
    "run.name=`touch pwned`",
    "run.name=`touch${IFS}pwned`",
    "run.name=x; touch pwned",
    "run.name=x;touch${IFS}pwned",
    "run.name=x&&touch${IFS}pwned",
    "run.name=x|touch pwned",
    "run.name=x>pwned",
    "run.name=x > pwned",
    "run.name='x'",
    "run.name='; touch pwned; '",
    'run.name="; touch pwned; "',
    'run.name=\\"; touch pwned; \\"',
    "run.name=\\$(touch pwned)",
    "run.name=\\\\$(touch pwned)",
    "run.name=*",
    "run.name=~",
    "wandb.tags=[a, b]",
    "eval.sets={valid: {split: valid}}",
    "a=$HOME and $PATH",
    "a=(b c)",
    "a=#b",
    "a= # b",
    "",
    " ",
    "a=!!",
    "=cat",
    "a=é日本",
    "a=\u00a0x",
]


def test_hostile_arguments_arrive_as_they_are(tmp_path):
    sent = [shell.word(text, what="x") for text in HOSTILE_ARGUMENTS]
    assert over_pdsh(sent, {}, tmp_path)["argv"] == HOSTILE_ARGUMENTS
    assert not list(tmp_path.rglob("pwned"))


def test_without_the_writing_they_are_run(tmp_path):
    """The check above can fail: DeepSpeed sends arguments as they are."""
    over_pdsh(["a=$(touch${IFS}pwned)"], {}, tmp_path)
    assert (tmp_path / "pwned").exists()


TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="%"), max_size=12)
SHELL = st.text(st.sampled_from(list(" $`\\\"'!();&|<>*?[]{}~#=ax")), max_size=10)


def test_any_argument_arrives(tmp_path):
    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(st.lists(TEXT | SHELL, min_size=20, max_size=60))
    def law(texts):
        assert over_pdsh([shell.word(text, what="x") for text in texts], {}, tmp_path)["argv"] == texts

    law()


@pytest.mark.parametrize("text", ["a=\nb", "a=\x00", "a=%n", "a=%h", "a=\x1b[0m", "a=\u2028", "a=\udcff", "a\tb"])
def test_what_cannot_be_sent_is_refused(text):
    with pytest.raises(InputError, match="cannot be sent"):
        shell.word(text, what="argument")


HOSTILE_VARIABLES = {
    "HF_A": "$(touch pwned)",
    "HF_B": "`touch pwned`",
    "HF_C": 'x"; touch pwned; "',
    "HF_D": "x\ntouch pwned",
    "HF_E": "\\",
    "WANDB_NOTES": "a ' b",
    "WANDB_F": "x; touch pwned",
    "WANDB_G": "100%h",
    "WANDB_H": " ends ",
    "WANDB_I": "\x1b[2J",
    "WANDB_TAGS": "a,b c",
}


def test_hostile_values_travel_without_a_shell(tmp_path):
    found = variables.sort(HOSTILE_VARIABLES)
    assert {**found.shown, **found.hidden} == HOSTILE_VARIABLES
    assert set(found.shown) == {"WANDB_NOTES", "WANDB_F", "WANDB_TAGS"}
    arrived = over_pdsh(["x"], found.shown, tmp_path)["environment"]
    assert {name: arrived[name] for name in found.shown} == found.shown
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "$(touch pwned)"},
        {"DS_ACCELERATOR": "cpu`touch pwned`"},
        {"PYTHONPATH": "$(touch pwned)"},
        {"PYTHONX": 'a"; touch pwned; "'},
        {"PYTHON;touch pwned": "1"},
        {"NCCL_DEBUG": "x\ntouch pwned"},
        {"UCX_A": "\\"},
        {"LD_LIBRARY_PATH": "`touch pwned`"},
        {"PATH": "/usr/bin:$(touch pwned)"},
        {"HF_X;touch pwned;": "1"},
        {"MLFLOW_URI": "100%n"},
    ],
)
def test_what_other_hosts_would_run_is_refused_by_name(environment):
    ((name, value),) = environment.items()
    with pytest.raises(InputError) as error:
        variables.sort(environment)
    assert name.split(";")[0] in str(error.value)
    if "touch" in value:
        assert value not in str(error.value)


def test_options_of_pdsh_and_stale_ranks_stay_here():
    stale = {
        "PDSH_SSH_ARGS_APPEND": "-oProxyCommand=touch", "PDSH_MODULE_DIR": "/tmp", "WCOLL": "f", "DSHPATH": "$(id)",
        "RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "x", "DS_ENV_FILE": "y", "LMTRAIN_PRIVATE": "../../x",
    }  # fmt: skip
    assert variables.sort({**stale, "HOME": "/h"}).own == {"HOME": "/h"}


def test_secrets_are_sorted_out():
    secret = "sesame-0123456789"
    environment = {
        "HF_TOKEN": secret,
        "WANDB_API_KEY": "k" * 40,
        "WANDB_BASE_URL": "https://me:passw0rd@example.org",
        "AWS_SECRET_ACCESS_KEY": "aws-secret-1",
        "AWS_REGION": "x",
        "OTHER_API_KEY": "other-secret",
        "MLFLOW_TRACKING_TOKEN": "mlflow-secret",
        "NOTE": f"my token is {secret}",
        "NCCL_NOTE": secret,
        "HF_HOME": "/data/hf",
        "OMP_NUM_THREADS": "4",
        "DS_ACCELERATOR": "cpu",
        "LANG": "C",
    }
    found = variables.sort(environment, file={"NCCL_DEBUG": "WARN", "HF_HOME": "/other", "X_TOKEN": "file-secret"})
    assert found.shown == {"HF_HOME": "/other", "OMP_NUM_THREADS": "4", "DS_ACCELERATOR": "cpu", "NCCL_DEBUG": "WARN"}
    assert set(found.hidden) == {
        "HF_TOKEN", "WANDB_API_KEY", "WANDB_BASE_URL", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "X_TOKEN",
    }  # fmt: skip
    text = json.dumps(found.shown) + json.dumps(found.own)
    for value in (secret, "k" * 40, "passw0rd", "aws-secret-1", "other-secret", "mlflow-secret", "file-secret"):
        assert value not in text
    assert found.own["LANG"] == "C"


def test_the_users_own_file_is_read_or_refused(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "work"
    for place in (home, folder):
        place.mkdir()
    environment = {"HOME": str(home)}
    assert variables.read_files(environment, folder) == {}
    (home / ".deepspeed_env").write_text("A=1\nB=x=y\n")
    (folder / ".deepspeed_env").write_text("A=2")
    assert variables.read_files(environment, folder) == {"A": "2", "B": "x=y"}
    for text, what in (("A=1\n\nB=2\n", "line 2 is blank"), ("# A=1\n", "a comment"), ("A\n", "no KEY=VALUE")):
        (folder / ".deepspeed_env").write_text(text)
        with pytest.raises(InputError, match=what):
            variables.read_files(environment, folder)
    with pytest.raises(InputError, match="value of A"):
        variables.sort({}, file={"A": "$(touch pwned)"})


def test_the_file_is_one_that_deepspeed_reads():
    text = variables.file_text({"B": "x=y z", "A": "1"})
    assert [line.split("=", maxsplit=1) for line in text.splitlines()] == [["A", "1"], ["B", "x=y z"]]
    assert not list(variables.lint(text))


def test_private_files_are_for_their_rank_alone():
    drawn = os.urandom(16).hex()
    values = {"HF_TOKEN": "sesame", "WANDB_NOTES": "a\nb\udcff"}
    old = os.umask(0)
    try:
        private.write(values, drawn=drawn, ranks=2)
    finally:
        os.umask(old)
    paths = [private._path(drawn, i) for i in range(2)]
    try:
        assert [path.stat().st_mode & 0o777 for path in paths] == [0o600, 0o600]
        environment = {private.VARIABLE: drawn, "A": "1"}
        private.take(environment, local_rank=0)
        assert environment == {"A": "1", **values}
        assert [path.exists() for path in paths] == [False, True]
        with pytest.raises(EngineError, match="cannot be read"):
            private.take({private.VARIABLE: drawn}, local_rank=0)
        paths[1].chmod(0o640)
        with pytest.raises(EngineError, match="may be read by others"):
            private.take({private.VARIABLE: drawn}, local_rank=1)
        paths[0].symlink_to(paths[1])
        with pytest.raises(EngineError, match="cannot be read"):
            private.take({private.VARIABLE: drawn}, local_rank=0)
        with pytest.raises(EngineError, match="is not what"):
            private.take({private.VARIABLE: "../../etc/passwd"}, local_rank=0)
    finally:
        private.remove(drawn, ranks=2)
    assert not any(path.exists() or path.is_symlink() for path in paths)
