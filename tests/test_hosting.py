"""How a studio is open: nobody gets in from outside without signing in, whatever the environment says."""

import pytest

from lora_studio import hosting
from lora_studio.errors import HostError

OAUTH = {"OPENID_PROVIDER_URL": "https://hub", "OAUTH_CLIENT_ID": "app", "OAUTH_CLIENT_SECRET": "hidden"}
SPACE = {"SPACE_ID": "ana/studio", "SPACE_HOST": "ana-studio.hf.space", "SPACE_AUTHOR_NAME": "ana"}


def test_on_loopback_it_is_open_to_this_machine_only():
    found = hosting.of({}, host="127.0.0.1")
    assert found.kind == "local" and found.is_open and found.hosts == hosting.LOOPBACK


@pytest.mark.parametrize("environment", [{}, {"LORA_STUDIO_HOSTS": "studio.example.org"}, SPACE, {**SPACE, **OAUTH}, {**OAUTH, "LORA_STUDIO_OPEN": "visitors"}])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7"])
def test_from_outside_somebody_has_to_sign_in(environment, host):
    found = hosting.of(environment, host=host)
    assert not found.is_open and (found.oauth or len(found.password) >= 12)


def test_behind_a_proxy_on_loopback_somebody_has_to_sign_in_too():
    assert not hosting.of({"LORA_STUDIO_HOSTS": "studio.example.org"}, host="127.0.0.1").is_open


def test_a_space_belongs_to_its_author_unless_said_otherwise():
    found = hosting.of({**SPACE, **OAUTH}, host="0.0.0.0")
    assert (found.kind, found.owners, found.space, found.public) == ("owner", ("ana",), "ana/studio", ("ana-studio.hf.space",))
    assert found.oauth.id == "app" and not found.password
    assert hosting.of({**SPACE, **OAUTH, "LORA_STUDIO_OPEN": "visitors"}, host="0.0.0.0").kind == "visitors"


def test_a_made_password_is_another_each_time_and_a_given_one_is_kept():
    first, second = (hosting.of({}, host="0.0.0.0") for _ in range(2))
    assert first.password_is_made and first.password != second.password
    given = hosting.of({"LORA_STUDIO_PASSWORD": "long enough"}, host="0.0.0.0")
    assert given.password == "long enough" and not given.password_is_made


@pytest.mark.parametrize(
    ("environment", "key"),
    [
        ({"LORA_STUDIO_OPEN": "everybody"}, "host.kind"),
        ({**SPACE, **OAUTH, "LORA_STUDIO_OPEN": "local"}, "host.local_space"),
        ({"LORA_STUDIO_OPEN": "visitors"}, "host.no_oauth"),
        ({**OAUTH, "LORA_STUDIO_OPEN": "owner"}, "host.no_owner"),
        ({"LORA_STUDIO_PASSWORD": "short"}, "host.short_password"),
        ({"LORA_STUDIO_DISK_GB": "much"}, "host.number"),
        ({"LORA_STUDIO_RUNS": "0"}, "host.number"),
        ({"LORA_STUDIO_HOURS": "-1"}, "host.number"),
        ({"LORA_STUDIO_STEPS": "nan"}, "host.number"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(environment, key):
    with pytest.raises(HostError) as caught:
        hosting.of(environment, host="0.0.0.0")
    assert caught.value.key == key


def test_the_owner_sets_what_visitors_may_use():
    limits = hosting.of({"LORA_STUDIO_BASES": "demo-*, Qwen/*", "LORA_STUDIO_DISK_GB": "1.5", "LORA_STUDIO_HOURS": "0.5", "LORA_STUDIO_RUNS": "1", "LORA_STUDIO_ADAPTERS": "4"}, host="127.0.0.1").limits
    assert (limits.bases, limits.disk, limits.seconds, limits.runs, limits.adapters) == (("demo-*", "Qwen/*"), 1_500_000_000, 1800.0, 1, 4)
    assert hosting.of({}, host="127.0.0.1").limits.bases == ("demo-text", "demo-image")


def test_nothing_secret_is_in_what_is_printed():
    shown = repr(hosting.of({**SPACE, **OAUTH, "LORA_STUDIO_PASSWORD": "a-pass-word"}, host="0.0.0.0"))
    assert "hidden" not in shown and "a-pass-word" not in shown
