"""The modules of the corpus `stdlib`, chosen once: those for training and those for validation.

The lists name modules that every distribution of Python 3.11 to 3.13 carries (no tkinter, no ensurepip, no test suite).
The text differs a little between Python versions, so the corpus hash tells which one a run saw.
"""

__all__ = ["PROSE_MODULE", "TRAIN_MODULES", "VALIDATION_MODULES", "VALIDATION_TOPIC_EVERY"]

PROSE_MODULE = "pydoc_data.topics"  # the language reference's sections, one document each
VALIDATION_TOPIC_EVERY = 20  # each 20th section, by sorted name, is for validation

VALIDATION_MODULES = (
    "calendar",
    "email.message",
    "fractions",
    "heapq",
    "json.decoder",
    "shlex",
    "textwrap",
    "urllib.parse",
)

TRAIN_MODULES = tuple(
    """
    _collections_abc _pydecimal _pyio _strptime _weakrefset abc argparse ast asyncio.base_events asyncio.events
    asyncio.futures asyncio.locks asyncio.proactor_events asyncio.queues asyncio.runners asyncio.selector_events
    asyncio.sslproto asyncio.streams asyncio.subprocess asyncio.tasks asyncio.transports asyncio.unix_events base64 bdb
    bisect bz2 cmd code codecs codeop collections colorsys compileall concurrent.futures._base
    concurrent.futures.process concurrent.futures.thread configparser contextlib contextvars copy copyreg csv
    ctypes.util dataclasses datetime decimal difflib dis doctest email._header_value_parser email._policybase
    email.charset email.contentmanager email.encoders email.feedparser email.generator email.header
    email.headerregistry email.mime.text email.policy email.utils enum filecmp fileinput fnmatch ftplib functools
    genericpath getopt getpass gettext glob graphlib gzip hashlib hmac html.parser http http.client http.cookiejar
    http.cookies http.server imaplib importlib._bootstrap importlib._bootstrap_external importlib.abc
    importlib.machinery importlib.util inspect io ipaddress json json.encoder json.scanner json.tool keyword linecache
    locale logging logging.config logging.handlers lzma mailbox mimetypes modulefinder multiprocessing.connection
    multiprocessing.context multiprocessing.dummy multiprocessing.forkserver multiprocessing.heap
    multiprocessing.managers multiprocessing.pool multiprocessing.process multiprocessing.queues
    multiprocessing.reduction multiprocessing.shared_memory multiprocessing.synchronize multiprocessing.util netrc
    ntpath numbers opcode operator optparse os pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint
    profile pstats pty py_compile pyclbr pydoc queue quopri random re re._compiler re._parser reprlib rlcompleter runpy
    sched secrets selectors shelve shutil signal site smtplib socket socketserver sqlite3.dump ssl stat statistics
    string struct subprocess symtable sysconfig tarfile tempfile threading timeit token tokenize tomllib._parser trace
    traceback tracemalloc types typing unittest.async_case unittest.case unittest.loader unittest.main unittest.mock
    unittest.result unittest.runner unittest.suite unittest.util urllib.error urllib.request urllib.response
    urllib.robotparser uuid warnings wave weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.simple_server
    wsgiref.util wsgiref.validate xml.dom.expatbuilder xml.dom.minidom xml.dom.pulldom xml.etree.ElementPath
    xml.etree.ElementTree xml.sax.expatreader xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client
    xmlrpc.server zipapp zipfile zipimport zoneinfo._common zoneinfo._tzpath zoneinfo._zoneinfo
    """.split()  # noqa: SIM905 - a list of words reads better wrapped than quoted
)
