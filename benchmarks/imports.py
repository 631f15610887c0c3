"""The workload as sagas of Sagacity; `benchmarks.load` plays everybody else.

    ImportRequested -> AuthenticateUser -> UserAuthenticated -> GenerateAccount -> AccountGenerated

Run by ``saga-worker benchmarks.imports:service``.
"""

from sagacity import Command, Event, Saga, Service, State, on, on_failure


class ImportRequested(Event, topic="imports", name="bench.ImportRequested"):
    import_id: str
    document: str
    last_step_fails: bool = False


class AuthenticateUser(Command, topic="auth", name="bench.AuthenticateUser"):
    import_id: str
    document: str


class RevokeUser(Command, topic="auth", name="bench.RevokeUser"):
    import_id: str


class UserAuthenticated(Event, topic="imports", name="bench.UserAuthenticated"):
    import_id: str
    document: str


class GenerateAccount(Command, topic="accounts", name="bench.GenerateAccount"):
    import_id: str
    document: str


class CloseAccount(Command, topic="accounts", name="bench.CloseAccount"):
    import_id: str


class AccountGenerated(Event, topic="imports", name="bench.AccountGenerated"):
    import_id: str
    document: str


class WelcomeUser(Command, topic="mail", name="bench.WelcomeUser"):
    import_id: str


class ImportUser(Saga, key="import_id"):
    """Three events in and two commands out; or one command more, refused, and two undone."""

    authenticating = State()
    generating = State()
    welcoming = State()
    done = State(final=True)
    refused = State(final=True)

    import_id: str
    document: str = ""
    last_step_fails: bool = False

    @on(ImportRequested, starts=True, goto=authenticating)
    def begin(self, event: ImportRequested) -> None:
        self.document, self.last_step_fails = event.document, event.last_step_fails
        undo = RevokeUser(self.import_id) if self.last_step_fails else None
        self.send(AuthenticateUser(self.import_id, self.document), undo=undo)

    @on(UserAuthenticated, when=authenticating, goto=generating)
    def authenticated(self) -> None:
        undo = CloseAccount(self.import_id) if self.last_step_fails else None
        self.send(GenerateAccount(self.import_id, self.document), undo=undo)

    @on(AccountGenerated, when=generating, goto=(welcoming, done))
    def generated(self) -> None:
        if self.last_step_fails:
            self.goto(ImportUser.welcoming)
            self.send(WelcomeUser(self.import_id))
        else:
            self.goto(ImportUser.done)

    @on_failure(WelcomeUser, when=welcoming, goto=refused)
    def not_welcome(self) -> None:
        self.compensate("the user cannot be welcomed")


class ItemCounted(Event, topic="items", name="bench.ItemCounted"):
    shelf: str
    item: int
    document: str


class ShelfClosed(Event, topic="items", name="bench.ShelfClosed"):
    shelf: str


class ItemMissing(Event, topic="missing", name="bench.ItemMissing"):
    item: int
    document: str


class Shelf(Saga, key="shelf"):
    """The hot one: a single instance hears of every item, and sends as much a step as the other."""

    counting = State()
    closed = State(final=True)

    shelf: str
    items: int = 0

    @on(ItemCounted, starts=True, when=counting, goto=counting)
    def counted(self, event: ItemCounted) -> None:
        self.items += 1
        if event.item % 3:
            self.publish(ItemMissing(event.item, event.document))

    @on(ShelfClosed, when=counting, goto=closed)
    def close(self) -> None: ...


service = Service("imports", sagas=[ImportUser, Shelf])
