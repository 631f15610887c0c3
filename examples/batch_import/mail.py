"""The opt-in mail: composing it, sending it over SMTP, and finding its link again."""

import contextlib
import re
from datetime import datetime
from email import message_from_bytes
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.policy import default as modern
from email.utils import format_datetime
from typing import Final
from urllib.parse import quote

import aiosmtplib

_LINK = re.compile(r"^(https?://\S+)\r?$", re.MULTILINE)  # a line of its own, unlike one in a name
# RFC 5322 dot-atoms on both sides, and RFC 6531's letters beyond ASCII.
_ATOM: Final = r"(?:[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]|[^\x00-\x7f])+"
_ADDRESS = re.compile(rf"({_ATOM}(?:\.{_ATOM})*)@({_ATOM}(?:\.{_ATOM})*)")
_TEXT: Final = """\
Hello {name},

an order asks for accounts in your name. Please confirm that this address is
yours:

{link}

If you did not order anything, ignore this mail and nothing will happen.
"""


class MailRefused(Exception):
    """The mail can never be delivered to this address; `reason` is the server's answer."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class MailUnavailable(Exception):
    """Try again later. The server may still have accepted the mail if only its answer was lost."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def confirm_link(confirm_url: str, token: str) -> str:
    """Return the link that the mail carries: `confirm_url` with the token as its last part."""
    return f"{confirm_url.rstrip('/')}/{quote(token, safe='')}"


def compose(
    *,
    to: str,
    name: str,
    token: str,
    message_id: str,
    confirm_url: str,
    sender: str,
    date: datetime,
) -> EmailMessage:
    """Return the opt-in mail; equal arguments give equal bytes, so repeated sending repeats itself.

    `message_id` comes with its angle brackets. Raises `MailRefused` for an address that the batch
    format lets pass but that no mail can be addressed to.
    """
    shown = " ".join(name.split())
    message = EmailMessage(policy=SMTP)
    message["To"] = _address(shown, to)
    message["From"] = sender
    message["Subject"] = "Please confirm your address"
    message["Date"] = format_datetime(date)
    message["Message-ID"] = message_id
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(_TEXT.format(name=shown or "there", link=confirm_link(confirm_url, token)))
    return message


def _address(name: str, spec: str) -> Address:
    parts = _ADDRESS.fullmatch(spec)
    if parts is None or not spec.isprintable():
        raise MailRefused(f"{spec!r} cannot be put into a header; expected dot-atoms around one @")
    # Not addr_spec=: it refuses the local parts beyond ASCII that SMTPUTF8 carries.
    return Address(display_name=name, username=parts[1], domain=parts[2])


def link_in(raw: bytes | str) -> str:
    """Return the confirm link of a received opt-in mail; raises ValueError if it has none."""
    data = raw.encode() if isinstance(raw, str) else raw
    message = message_from_bytes(data, policy=modern)
    assert isinstance(message, EmailMessage)
    found = _LINK.search(str(message.get_content()))
    if found is None:
        raise ValueError(f"mail {message['Message-ID']} holds no link; expected the opt-in mail")
    return found[1]


async def send(message: EmailMessage, *, host: str, port: int, timeout: float = 30.0) -> None:
    """Hand a mail to the SMTP server; it has been accepted when this returns.

    `timeout` in seconds bounds each step of the dialogue. Raises `MailRefused` when the server
    says 5xx to the sender, the recipient or the content, and `MailUnavailable` for 4xx, for a
    server that does not want to talk at all, and for every fault on the way.
    """
    client = aiosmtplib.SMTP(hostname=host, port=port, timeout=timeout, start_tls=False)
    try:
        await client.connect()
        await client.send_message(message)
    except aiosmtplib.SMTPRecipientsRefused as error:
        refused = error.recipients[0]
        raise _verdict(refused.code, refused.message) from error
    except (aiosmtplib.SMTPConnectResponseError, aiosmtplib.SMTPHeloError) as error:
        # Not about this mail: another server, or this one later, may take it.
        raise MailUnavailable(f"{host}:{port} answered {error.code} {error.message}") from error
    except aiosmtplib.SMTPResponseException as error:
        raise _verdict(error.code, error.message) from error
    except aiosmtplib.SMTPNotSupported as error:
        raise MailRefused(f"{host}:{port} cannot carry this address: {error}") from error
    except (aiosmtplib.SMTPException, OSError) as error:
        raise MailUnavailable(f"{host}:{port}: {error!r}") from error
    else:
        # Accepted is accepted: a fault while saying goodbye must not repeat the mail.
        with contextlib.suppress(aiosmtplib.SMTPException, OSError):
            await client.quit()
    finally:
        client.close()


def _verdict(code: int, text: str) -> MailRefused | MailUnavailable:
    reason = f"{code} {text}"
    return MailRefused(reason) if 500 <= code < 600 else MailUnavailable(reason)
