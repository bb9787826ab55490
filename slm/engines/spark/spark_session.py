"""Finds or starts the Spark session, and sends this package to its workers."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slm.base import cache, environment
from slm.base.errors import BadInput, Unavailable
from slm.tracking import mlflow_client

LOCAL = "local[*,4]"  # a task is tried four times, as on a cluster
OUT_OF_MEMORY = 3  # exit code of a JVM with ExitOnOutOfMemoryError
LOCAL_STORES = ("sqlite:", "file:", "/", ".")  # tracking URIs that mean something on this machine alone


# ---------------------------------------------------------------------------------------------------------------------
# The session


def session(master: str):
    """The active Spark session, or a new one on `master` (empty: all cores of this machine).

    Raises:
        BadInput: pyspark or Java is missing, `master` can't be one, or it isn't that of the session that is there.
        Unavailable: the master doesn't answer.
    """
    mlflow = mlflow_client.quiet_mlflow()  # of pyspark's warnings, too
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        remedy = "pip install -r requirements-spark.txt -c constraints.txt"
        raise BadInput(f"engine: spark needs pyspark, which is not installed; {remedy}") from None
    active = SparkSession.getActiveSession()
    if active is not None:
        there = active.sparkContext.master
        if master not in ("", there):
            raise BadInput(
                f"spark_master: {master!r} is not that of the session that is there, {there}; leave it empty"
            )
    elif not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise BadInput("engine: spark needs Java, which is not on PATH; install a JRE, version 17 or 21")
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # spark-submit has chosen a master
    builder = SparkSession.builder.appName("phi3-mlflow evaluate")
    if active is None and (master or not submitted):
        builder = builder.master(master or LOCAL).config("spark.ui.showConsoleProgress", "false")
        if (master or "local").startswith("local"):
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
            builder = builder.config("spark.ui.enabled", "false")  # it would listen on every address
    interrupt = signal.getsignal(signal.SIGINT)
    # else a thread of the driver dies alone, and the driver waits for what it should have brought, for ever
    options = {"SPARK_SUBMIT_OPTS": f"{os.environ.get('SPARK_SUBMIT_OPTS', '')} -XX:+ExitOnOutOfMemoryError"}
    try:
        with environment.variables(options):
            spark = active or builder.getOrCreate()
    except Exception as error:
        if "parse Master URL" in str(error):
            raise BadInput(f"spark_master: {master!r} is none; write local[4], spark://host:7077, yarn, …") from None
        raise Unavailable(f"spark_master: {master or LOCAL}: {_reason(error)}") from None
    finally:
        if interrupt is not None:
            signal.signal(signal.SIGINT, interrupt)  # pyspark puts its own in the place of ours
    if active is None:
        spark.sparkContext.setLogLevel("FATAL")  # what a task died of is told in one line
    if not str(spark.sparkContext.master).startswith("local"):
        uri = mlflow.get_tracking_uri()
        if uri.startswith(LOCAL_STORES):
            raise BadInput(f"engine: workers can't reach the tracking store {uri}; set MLFLOW_TRACKING_URI to a server")
    _send_package(spark.sparkContext)
    return spark


def _send_package(context) -> None:
    """Sends this package to the workers, into the folder where Spark puts files and Python finds modules."""
    folder = Path(__file__).parents[2]
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix in (".py", ".html")}
    parts = (name.encode() + files[name].read_bytes() for name in sorted(files))
    content = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    target = cache.private("spark") / f"package-{content}.zip"
    if not target.exists():
        building = target.with_name(f"{target.name}.{os.getpid()}")
        with zipfile.ZipFile(building, "w") as package:
            for name in sorted(files):
                package.write(files[name], name)
        building.replace(target)
    context.addArchive(f"{target}#{folder.name}")
    for name in ("requirements.txt", "constraints.txt"):  # slm/base/environment.py reads them
        context.addFile(str(environment.REPOSITORY / name))


@contextmanager
def _spark_errors() -> Iterator[None]:
    """Turns Spark's errors into one line."""
    from py4j.protocol import Py4JError, Py4JNetworkError
    from pyspark import SparkContext
    from pyspark.errors import PySparkException

    try:
        yield
    except (Py4JNetworkError, EOFError, ConnectionError) as error:  # nobody is there any more
        process = getattr(SparkContext._gateway, "proc", None)
        with suppress(subprocess.TimeoutExpired):
            if process and process.wait(10) == OUT_OF_MEMORY:
                remedy = "give it more, SPARK_DRIVER_MEMORY=4g"
                raise Unavailable(f"spark: the memory of the driver's JVM is used up; {remedy}") from error
        raise Unavailable(f"spark: the driver's JVM doesn't answer ({_reason(error)})") from error
    except (PySparkException, Py4JError) as error:
        raise Unavailable(f"spark: a task failed, after retries: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line of a traceback that names the error. If the error came from a worker, the line is the worker's."""
    named = re.findall(
        r"^\s*((?:Caused by: )?[\w.]+(?:Error|Exception|BadInput|Unavailable)\b[^\n]*)", str(error), re.M
    )
    workers = [line for line in named if not line.startswith(("Caused by", "org.", "java."))]
    line = (workers or named or [str(error)])[-1]
    return " ".join(line.split())[:500]
