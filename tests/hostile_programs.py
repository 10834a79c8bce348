"""Programs that try to get out of the sandbox, and ordinary ones. Used by test_execution.py."""

from __future__ import annotations

# Before each hostile program. An attack that works prints ESCAPED; one that is stopped raises, or returns C's -1.
PRELUDE = """
import ctypes, gc, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def denied(call, *arguments, **named):
    try:
        result = call(*arguments, **named)
    except Exception:
        return
    if result != -1:
        print("ESCAPED", call, arguments, result)
def callers(frame):
    while frame := frame.f_back:
        yield frame
"""
OK, FAILS, TIMEOUT, MEMORY = "ok", "fails", "timeout", "memory"  # else: what the error contains
HANG_S = 0.7
SECRET = "NANOCHAT_SECRET_OF_THE_TEST"

# name, program, how it ends. PARENT, OUTSIDE and HOME stand for the test's process, a folder of its own, and the home.
HOSTILE = [
    # processes and threads
    ("fork", "denied(os.fork)", OK),
    ("fork bomb", "while True: os.fork()", "PermissionError"),
    ("fork by ctypes", "denied(libc.fork); denied(libc.vfork)", OK),
    ("clone by number",
     "import signal\nif os.uname().machine == 'x86_64': denied(libc.syscall, 56, signal.SIGCHLD, 0, 0, 0, 0)", OK),
    ("clone3 by number", "denied(libc.syscall, 435, ctypes.create_string_buffer(88), 88)", OK),
    ("double fork",
     "os.setsid() if os.getsid(0) != os.getpid() else 0\n"
     "if os.fork() == 0:\n if os.fork() == 0:\n  while True: pass", "PermissionError"),
    ("pty.fork", "import pty\ndenied(pty.fork)", OK),
    ("thread", "import threading\ndenied(threading.Thread(target=print).start)", OK),
    ("thread bomb",
     "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()", "RuntimeError"),
    ("raw thread", "import _thread\ndenied(_thread.start_new_thread, print, ())", OK),
    ("subprocess", "import subprocess\ndenied(subprocess.run, ['/bin/sh', '-c', 'echo ESCAPED'])", OK),
    ("os.system", "assert os.system('echo ESCAPED') in (-1, 127 << 8)", OK),
    ("os.popen", "denied(os.popen, 'echo ESCAPED')", OK),
    ("libc system", "assert libc.system(b'echo ESCAPED') in (-1, 127 << 8)", OK),
    ("posix_spawn", "denied(os.posix_spawn, '/bin/sh', ['sh', '-c', 'echo ESCAPED'], {})", OK),
    ("exec", "denied(os.execv, '/bin/sh', ['sh', '-c', 'echo ESCAPED'])", OK),
    ("exec of Python", "denied(os.execv, sys.executable, [sys.executable, '-c', 'print(\"ESCAPED\")'])", OK),
    ("multiprocessing", "import multiprocessing\ndenied(multiprocessing.Process(target=print).start)", OK),
    ("process pool",
     "from concurrent.futures import ProcessPoolExecutor\ndenied(lambda: ProcessPoolExecutor(1).submit(print))", OK),
    ("asyncio subprocess", "import asyncio\ndenied(lambda: asyncio.run(asyncio.create_subprocess_exec('/bin/true')))", OK),
    # memory
    ("list", "x = []\nwhile True: x.append('y' * 10**6)", MEMORY),
    ("bytearray", "bytearray(10**10)", MEMORY),
    ("swallowed memory error",
     "x = []\ntry:\n while True: x.append(bytes(10**6))\nexcept MemoryError: pass\nx.append(bytes(10**8))", MEMORY),
    ("dict", "x = {}\nwhile True: x[len(x)] = [0] * 1000", MEMORY),
    ("mmap", "import mmap\nmmap.mmap(-1, 2**30)", "OSError"),
    ("memfd", "denied(os.memfd_create, 'x')", OK),
    ("shared memory",
     "from multiprocessing import shared_memory\ndenied(shared_memory.SharedMemory, create=True, size=9)", OK),
    ("System V memory", "denied(libc.shmget, 0, 2**30, 0o1600)", OK),
    ("message queue", "denied(libc.mq_open, b'/x', 66, 0o600, None); denied(libc.msgget, 0, 0o1600)", OK),
    ("locked memory", "denied(libc.mlockall, 3)", OK),
    ("higher limits",
     "import resource\n"
     "for name in ('AS', 'CPU', 'NPROC', 'FSIZE', 'NOFILE'): denied(resource.setrlimit, getattr(resource, "
     "'RLIMIT_' + name), (2**40, 2**40))", OK),
    ("limits of another", "import resource\ndenied(resource.prlimit, PARENT, resource.RLIMIT_CPU, (1, 1))", OK),
    ("zip bomb",
     "import zlib\nc = zlib.compressobj()\nb = b''.join(c.compress(bytes(10**6)) for _ in range(400)) + c.flush()\n"
     "zlib.decompress(b)", MEMORY),
    ("recursion", "def f(): f()\nf()", "RecursionError"),
    ("endless recursion", "sys.setrecursionlimit(10**9)\ndef f(): [0 for _ in [f()]]\nf()", FAILS),
    ("deep JSON", "import json\njson.loads('[' * 10**6)", "RecursionError"),
    ("deep syntax", "eval('-' * 10**6 + '1')", FAILS),
    ("deep repr", "x = []\nfor _ in range(10**5): x = [x]\nrepr(x)", "RecursionError"),
    # time
    ("loop", "while True: pass", TIMEOUT),
    ("sleep", "import time\ntime.sleep(10**6)", TIMEOUT),
    ("giant int", "9**9**9", TIMEOUT),
    ("regex", "import re\nre.match('(a+)+$', 'a' * 50 + 'b')", TIMEOUT),
    ("generator", "import itertools\nsum(itertools.count())", TIMEOUT),
    ("pause", "import signal\nsignal.pause()", TIMEOUT),
    ("deadlock", "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()", TIMEOUT),
    ("ignores signals",
     "import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n"
     " except (OSError, ValueError): pass\nwhile True: pass", TIMEOUT),
    ("swallows everything", "while True:\n try:\n  while True: pass\n except BaseException: pass", TIMEOUT),
    ("stops itself", "import signal\nos.kill(os.getpid(), signal.SIGSTOP)", TIMEOUT),
    ("outlives its parent", "libc.prctl(1, 0)\ntry: os.setsid()\nexcept OSError: pass\nwhile True: pass", TIMEOUT),
    ("closes its pipes and loops", "os.closerange(0, 64)\nwhile True: pass", TIMEOUT),
    ("slow text of an exception", "class E(Exception):\n def __str__(self):\n  while True: pass\nraise E", TIMEOUT),
    ("dribbles", "import time\nwhile True: print('x', flush=True); time.sleep(0.01)", TIMEOUT),
    # files
    ("many files", "for i in range(10**6): open(f'/scratch/{i}', 'w').write('x' * 9999)", "OSError"),
    ("empty files", "for i in range(10**6): os.close(os.open(f'/scratch/{i}', os.O_CREAT))", "OSError"),
    ("big file", "with open('x', 'wb') as f:\n while True: f.write(bytes(10**6))", "OSError"),
    ("sparse file", "denied(os.truncate, open('x', 'w').fileno(), 2**30)", OK),
    ("unlinked files",
     "fs = []\nwhile True: fs.append(open('x', 'wb')); fs[-1].write(bytes(10**6)); fs[-1].flush(); os.unlink('x')", "OSError"),
    ("root",
     "for d in ('/', '/dev', '/sandbox', '/usr', '/usr/lib', '/bin', '/proc', sys.prefix, "
     "os.path.dirname(sys.prefix)):\n"
     " denied(open, d + '/x', 'w'); denied(os.mkdir, d + '/y'); denied(os.symlink, 'x', d + '/z')", OK),
    ("scratch folder only", "for d in os.listdir('/'):\n if d != 'scratch': denied(open, f'/{d}/x', 'w')", OK),
    ("devices",
     "assert set(os.listdir('/dev')) == {'null', 'zero', 'urandom'}\nfor n in os.listdir('/dev'):\n"
     " denied(os.chmod, '/dev/' + n, 0o666); denied(os.chown, '/dev/' + n, 0, 0); denied(os.utime, '/dev/' + n); "
     "denied(os.unlink, '/dev/' + n)", OK),
    ("terminal", "import fcntl\ndenied(open, '/dev/tty'); denied(fcntl.ioctl, 0, 0x5412, b'x')", OK),
    ("mknod",
     "import stat\n"
     "denied(os.mknod, 'n', 0o600 | stat.S_IFBLK, os.makedev(254, 0)); "
     "denied(os.mknod, 'c', 0o600 | stat.S_IFCHR, os.makedev(1, 1))", OK),
    ("passwords", "for p in ('/etc/passwd', '/etc/shadow', '/etc/hostname'): denied(open, p)", OK),
    ("other folders",
     "for p in ('/etc', '/var', '/home', '/tmp', '/run', '/sys', '/mnt', '/boot', '/opt/x'): denied(os.listdir, p)", OK),
    ("home",
     "for n in ('.bashrc', '.profile', '.ssh', '.cache', '.gitconfig', '.bash_history'): denied(os.stat, "
     "'HOME/' + n)", OK),
    ("outside", "denied(os.listdir, 'OUTSIDE'); denied(open, 'OUTSIDE/x', 'w'); denied(os.makedirs, 'OUTSIDE/y')", OK),
    ("dots",
     "os.chdir('../../../../../..')\nassert os.getcwd() == '/'\n"
     "denied(open, '../../etc/passwd'); denied(open, '/scratch/../../../etc/passwd'); denied(open, '/old/etc/passwd')", OK),
    ("symbolic link",
     "os.symlink('/etc', 'l'); os.symlink('OUTSIDE', 'm')\ndenied(os.listdir, 'l'); denied(open, 'm/x', 'w')", OK),
    ("hard link", "denied(os.link, sys.executable, 'x'); denied(os.link, '/sandbox/worker.py', 'y')", OK),
    ("proc", "for p in ('/proc/self', '/proc/1', '/proc/PARENT', '/proc/sys', '/proc/self/mem'): denied(os.stat, p)", OK),
    ("worker's file",
     "assert 'def run_program' in open('/sandbox/worker.py').read()\n"
     "for m in 'wa': denied(open, '/sandbox/worker.py', m)\n"
     "denied(os.unlink, '/sandbox/worker.py'); denied(os.rename, '/sandbox/worker.py', '/sandbox/w'); "
     "denied(os.truncate, '/sandbox/worker.py', 0)", OK),
    ("environment",
     "assert set(os.environ) == {'PATH', 'LANG', 'HOME', 'TMPDIR'}, os.environ\n"
     "libc.getenv.restype = ctypes.c_char_p\nassert libc.getenv(b'SECRET') is None", OK),
    ("installed packages", "for n in ('torch', 'numpy', 'nanochat', 'psutil'): denied(__import__, n)", OK),
    # other processes and privileges
    ("signals to its parent", "import signal\nfor s in (1, 2, 3, 9, 15, 17, 19, 20): os.kill(os.getppid(), s)", OK),
    ("signals to all",
     "import signal\nfor s in (1, 2, 15, 19, 9):\n try: os.kill(-1, s)\n except ProcessLookupError: pass\n"
     "assert os.getppid() == 1", OK),
    ("signal to its group", "import signal\nos.killpg(0, signal.SIGKILL)", "signal 9"),
    ("signals to the test", "for s in (0, 9): denied(os.kill, PARENT, s)", OK),
    ("kills itself", "os.kill(os.getpid(), 9)", "signal 9"),
    ("terminates itself", "os.kill(os.getpid(), 15)", "signal 15"),
    ("aborts", "os.abort()", "signal 6"),
    ("ptrace",
     "denied(libc.ptrace, 16, 1, 0, 0); denied(libc.ptrace, 0, 0, 0, 0); "
     "denied(libc.process_vm_readv, 1, None, 0, None, 0, 0)", OK),
    ("namespaces",
     "for flag in (0x10000000, 0x00020000, 0x40000000, 0x20000000): denied(libc.unshare, flag)\n"
     "denied(libc.setns, 0, 0)", OK),
    ("mount",
     "denied(libc.mount, b'x', b'/scratch', b'tmpfs', 0, None); denied(libc.mount, b'/', b'/scratch', None, 4096, None); "
     "denied(libc.umount2, b'/scratch', 2); denied(libc.mount, b'', b'/', None, 32, None)", OK),
    ("chroot",
     "denied(os.chroot, '/scratch'); "
     "denied(libc.pivot_root if hasattr(libc, 'pivot_root') else os.chroot, b'/scratch', b'/scratch')", OK),
    ("users", "denied(os.setuid, 1); denied(os.setgid, 1); denied(os.setgroups, [1]); denied(os.setresuid, 1, 2, 3)", OK),
    ("capabilities",
     "assert all(libc.prctl(23, c, 0, 0, 0) <= 0 for c in range(41))\nassert libc.prctl(39, 0, 0, 0, 0) == 1\n"
     "denied(libc.prctl, 38, 0, 0, 0, 0)", OK),
    ("system",
     "import socket, time\n"
     "denied(socket.sethostname, 'x'); denied(libc.reboot, 0); denied(time.clock_settime, 0, 0.0); "
     "denied(os.nice, -5); denied(libc.syslog, 3, None, 0) if 0 else None", OK),
    ("kernel interfaces",
     "if os.uname().machine == 'x86_64':\n"
     " for n in (321, 298, 250, 248, 425, 426, 427, 323, 246, 175, 313, 135, 304, 434, 438, 447, 320, 428, 430, "
     "442, 317): denied(libc.syscall, n, 0, 0, 0, 0, 0)", OK),
    ("x32 calls", "if os.uname().machine != 'x86_64': os.kill(os.getpid(), 31)\nlibc.syscall(0x40000000 + 57)", "signal 31"),
    # network
    ("sockets",
     "import socket\n"
     "for f in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET, 40):\n"
     " for k in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW): denied(socket.socket, f, k)", OK),
    ("TCP", "import socket\nsocket.create_connection(('127.0.0.1', 80))", "PermissionError"),
    ("abstract socket",
     "import socket\na, b = socket.socketpair()\n"
     "denied(a.connect, '\\0x'); denied(a.bind, '\\0y'); denied(a.bind, '/scratch/s')", OK),
    ("names", "import socket\ndenied(socket.getaddrinfo, 'example.com', 80)", OK),
    ("download", "import urllib.request\ndenied(urllib.request.urlopen, 'http://example.com', timeout=1)", OK),
    # faking the verdict
    ("os._exit", "os._exit(0)", "exit code 0"),
    ("sys.exit", "sys.exit(0)", "SystemExit: 0"),
    ("SystemExit", "raise SystemExit", "SystemExit"),
    ("KeyboardInterrupt", "raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("exits in a destructor", "class A:\n def __del__(self): os._exit(0)\na = A()\ndel a\nassert False", "exit code 0"),
    ("exits in an exception's text", "class E(Exception):\n def __str__(self): os._exit(0)\nraise E", "exit code 0"),
    ("bad text of an exception", "class E(Exception):\n def __str__(self): return 1\nraise E", "exit code 1"),
    ("long text of an exception", "raise ValueError('é😀\\ud800\\n' * 10**6)", "ValueError: é😀"),
    ("exit handler", "import atexit\natexit.register(print, 'ESCAPED')", OK),
    ("forged report",
     "for fd in range(64):\n try: os.write(fd, b'\\nok ' + b'0' * 64 + b'\\n')\n except OSError: pass\n"
     "os._exit(0)", "exit code 0"),
    ("forged report and failure", "os.write(3, b'\\nok ' + b'0' * 64 + b'\\n')\nassert False", "AssertionError"),
    ("worker's own functions",
     "import hashlib\nfor f in gc.get_objects():\n"
     " if getattr(f, '__name__', 0) == 'finish': f(os.write, os._exit, hashlib.blake2b(key=b'x', digest_size=32), "
     "b'ok')", "exit code 0"),
    ("__main__", "import __main__\nassert not hasattr(__main__, 'finish') and __main__.denied is denied", OK),
    ("key in frames",
     "import re\nfor f in callers(sys._getframe()):\n"
     " if re.search('[0-9a-f]{64}', repr([*f.f_locals.values()]) + repr(sys.argv)): print('ESCAPED')\n"
     " assert not any(hasattr(v, 'hexdigest') for v in f.f_locals.values())", OK),
    ("key among all objects",
     "import re\nseen, todo = set(), gc.get_objects()\nwhile todo:\n x = todo.pop()\n if id(x) in seen: continue\n"
     " seen.add(id(x))\n"
     " if type(x) in (str, bytes) and re.fullmatch('[0-9a-f]{64}', "
     "x if type(x) is str else x.decode('latin-1')): print('ESCAPED', x)\n"
     " if gc.is_tracked(x): todo += gc.get_referents(x)", OK),
    ("rewritten functions",
     "import builtins, hashlib, json\nwrite = os.write\n"
     "os.write = lambda fd, b: write(fd, b.replace(b'error', b'ok'))\n"
     "os._exit = json.dumps = hashlib.blake2b = lambda *a: b'ok'\nclass B(bytes):\n"
     " def __radd__(self, b): return b'ok'\nclass S(str):\n def encode(self, *a): return B()\n"
     " def __getitem__(self, i): return self\n def __format__(self, f): return self\nclass E(BaseException):\n"
     " def __str__(self): return S()\n"
     "builtins.type = builtins.ascii = builtins.str = builtins.repr = lambda *a: E()\nraise E", FAILS),
    ("rewritten worker",
     "for f in callers(sys._getframe()):\n if 'finish' in f.f_globals: print('ESCAPED')\n"
     " for n in ('describe', 'MAX_ERROR_CHARS', 'type', 'BaseException'): f.f_globals[n] = lambda *a: b'ok'\n"
     "assert False", FAILS),
    ("no builtins", "import builtins\nbuiltins.__dict__.clear()\nassert False", FAILS),
    ("trace",
     "def spy(frame, event, arg):\n for n in frame.f_locals:\n"
     "  if n != 'spy' and frame.f_code.co_name in ('run_program', 'main'): frame.f_locals[n] = b'ok'\n"
     " if frame.f_code.co_name == 'run_program':\n  for n in range(200):\n"
     "   try: frame.f_lineno = frame.f_code.co_firstlineno + n\n   except ValueError: pass\n return spy\n"
     "for f in callers(sys._getframe()): f.f_trace = spy\nsys.settrace(spy)\nsys.setprofile(spy)\n"
     "assert False", "AssertionError"),
    ("import hooks",
     "class Hook:\n def find_spec(self, *a): raise ImportError\nsys.meta_path.insert(0, Hook())\n"
     "sys.path_hooks.clear()\nsys.modules.clear()\nassert False", "AssertionError"),
    ("closed pipes", "os.closerange(0, 64)", FAILS),
    ("closed stdout", "sys.stdout.close()", OK),
    ("broken stdout", "class S:\n def flush(self): raise SystemExit\nsys.stdout = S()\nsys.stderr = None", OK),
    # output
    ("stdout flood", "while True: print('x' * 1000)", "output limit of 64 KiB"),
    ("stderr flood", "while True: print('x' * 1000, file=sys.stderr)", "output limit of 64 KiB"),
    ("raw flood", "while True: os.write(1, b'x' * 1000)", "output limit of 64 KiB"),
    ("report flood", "while True: os.write(3, b'\\n' * 1000)", "output limit of 64 KiB"),
    ("a little too much", "print('x' * 2**16)", "output limit of 64 KiB"),
    ("garbage to all fds", "for fd in range(64):\n try: os.write(fd, os.urandom(99))\n except OSError: pass", OK),
    ("reads all fds", "for fd in range(64):\n try:\n  if os.read(fd, 9): print('ESCAPED', fd)\n except OSError: pass", OK),
    ("open fds", "import errno\nfor fd in range(4, 64): denied(os.fstat, fd)", OK),
    ("surrogates", "print('\\ud800')", "UnicodeEncodeError"),
    ("input", "input()", "EOFError"),
    # the interpreter
    ("null pointer", "ctypes.string_at(0)", "signal 11"),
    ("faulthandler", "import faulthandler\nfaulthandler.enable()\nfaulthandler._sigsegv()", "signal 11"),
    ("bad bytecode",
     "f = lambda: 0\nf.__code__ = f.__code__.replace(co_code=bytes(range(90, 190)), co_consts=())\nf()", FAILS),
    ("bad marshal", "import marshal\nmarshal.loads(b'\\xe3' + bytes(range(99)))", FAILS),
    ("syntax error", "def f(:", "SyntaxError"),
    ("NUL in the source", "x = '\0'", FAILS),
    ("surrogate in the source", "x = '\ud800'", FAILS),
]  # fmt: skip

# What ordinary programs do, and what they print.
ORDINARY = [
    ("", ""),
    ("print('hello')", "hello\n"),
    ("print('é😀', chr(0))", "é😀 \0\n"),
    ("import os\nos.write(1, b'\\xff')", "\ufffd"),
    ("print('x' * 65535)", "x" * 65535 + "\n"),
    ("print(__name__, __file__ if '__file__' in globals() else '')", "__main__ \n"),
    ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\nprint(A())", "A(x=1)\n"),
    ("import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)", "True\n"),
    ("import tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'abc'); f.seek(0); print(f.read())", "b'abc'\n"),
    ("open('x', 'w').write('abc')\nprint(open('/scratch/x').read())", "abc\n"),
    ("import asyncio\nprint(asyncio.run(asyncio.sleep(0, 'done')))", "done\n"),
    ("import random, uuid, time\nprint(len({uuid.uuid4() for _ in range(9)}), time.time() > 10**9)", "9 True\n"),
    ("import unittest\nclass T(unittest.TestCase):\n    def test(self): pass\nunittest.main(exit=False, argv=['x'])", ""),
    ("pass\n" * 20000, ""),
]  # fmt: skip
