//! Load from wrk and iperf3.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portal::testing::agent::command_in;
use portal::testing::eventually;

use crate::columns::{Column, Door};

/// The port of the pods' web servers.
pub const WEB: u16 = 8080;
/// The port of iperf3.
pub const IPERF: u16 = 5201;
/// How many connections ask at once.
const CLIENTS: &str = "8";

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Load {
    /// A connection for each request.
    Connections,
    /// Requests over connections that stay.
    Requests,
    /// Datagrams of 64 bytes that arrive.
    Datagrams,
    /// One connection, as much as it takes.
    Bulk,
}

impl Load {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Connections, Self::Requests, Self::Datagrams, Self::Bulk];

    /// The load in words, with its unit.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Connections => "new connections/s",
            Self::Requests => "kept-alive requests/s",
            Self::Datagrams => "datagrams/s",
            Self::Bulk => "bulk Mbit/s",
        }
    }
}

/// What was measured once.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    /// How many in a second.
    pub rate: f64,
    /// How long half of the requests took at most, and 99 of 100, in microseconds; 0 if that was not asked.
    pub latencies: [f64; 2],
}

/// Debian's programs.
pub struct Tools {
    folder: PathBuf,
    length: Duration,
}

impl Tools {
    /// Those unpacked into `folder`, to run for so long each time.
    pub const fn new(folder: PathBuf, length: Duration) -> Self {
        Self { folder, length }
    }

    /// Measures once.
    ///
    /// # Errors
    /// If a program fails, or says what can't be read.
    pub fn measure(&self, column: &Column, door: Door, load: Load) -> Result<Figure> {
        match load {
            Load::Connections => self.wrk(column, door, &["-H", "Connection: close"]),
            Load::Requests => self.wrk(column, door, &[]),
            Load::Datagrams => {
                let figure = self.iperf(column, door, &["-u", "-b", "0", "-l", "64"], "sum");
                figure.map(|(rate, lost)| Figure {
                    rate: rate / 512.0 * (1.0 - lost / 100.0),
                    latencies: [0.0; 2],
                })
            }
            Load::Bulk => {
                let (rate, _) = self.iperf(column, door, &[], "sum_received")?;
                Ok(Figure { rate: rate / 1e6, latencies: [0.0; 2] })
            }
        }
    }

    /// Waits until every door of a column is served.
    pub fn wait(&self, column: &Column) {
        let short = Self { folder: self.folder.clone(), length: Duration::from_secs(1) };
        for door in Door::ALL {
            let what = format!("{}: {}", column.name, door.label());
            let serves = |figure: &Figure| figure.rate > 0.0;
            eventually(&what, || {
                short.measure(column, door, Load::Connections).ok().filter(serves)
            });
        }
    }

    fn program(&self, name: &str) -> PathBuf {
        self.folder.join("usr/bin").join(name)
    }

    fn prepared<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("LD_LIBRARY_PATH", self.folder.join("usr/lib/x86_64-linux-gnu"))
    }

    fn seconds(&self) -> String {
        self.length.as_secs().to_string()
    }

    fn wrk(&self, column: &Column, door: Door, more: &[&str]) -> Result<Figure> {
        let mut wrk = column.command(door, &self.program("wrk"));
        let url = format!("http://{}/", column.target(door, WEB));
        self.prepared(&mut wrk)
            .args(["-t", "1", "-c", CLIENTS, "-d", &self.seconds(), "--latency"])
            .args(more)
            .arg(url);
        let text = said(&mut wrk)?;
        let after = |label: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(label));
            line.with_context(|| format!("wrk did not say {label}: {text}")).map(str::trim)
        };
        let rate = after("Requests/sec:")?.parse()?;
        Ok(Figure { rate, latencies: [microseconds(after("50%")?)?, microseconds(after("99%")?)?] })
    }

    /// Bits in a second, and how many of 100 datagrams were lost.
    fn iperf(&self, column: &Column, door: Door, more: &[&str], sum: &str) -> Result<(f64, f64)> {
        let _server = self.serve(column, door)?;
        let to = column.target(door, IPERF);
        let mut client = column.command(door, &self.program("iperf3"));
        self.prepared(&mut client)
            .args(["-J", "-t", &self.seconds(), "-c", &to.ip().to_string(), "-p"])
            .arg(to.port().to_string())
            .args(more);
        let text = said(&mut client)?;
        let json: serde_json::Value = serde_json::from_str(&text)?;
        let end = &json["end"][sum];
        let rate = end["bits_per_second"].as_f64();
        let rate = rate.with_context(|| format!("iperf3 said no rate: {text}"))?;
        Ok((rate, end["lost_percent"].as_f64().unwrap_or_default()))
    }

    /// An iperf3 for one client.
    fn serve(&self, column: &Column, door: Door) -> Result<Server> {
        let pod = column.server(door);
        let mut server = command_in(&pod.namespace, &self.program("iperf3"));
        self.prepared(&mut server).args(["-s", "-1"]);
        let child = server.stdout(Stdio::null()).spawn().context("cannot run iperf3")?;
        let server = Server(child);
        eventually("iperf3 listens", || {
            let sockets =
                pod.namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/tcp6"));
            sockets.ok()?.contains(&format!(":{IPERF:04X} ")).then_some(())
        });
        Ok(server)
    }
}

/// A process that ends with this.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a program says.
fn said(command: &mut Command) -> Result<String> {
    let name = Path::new(command.get_program()).display().to_string();
    let output = command.output().with_context(|| format!("cannot run {name}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let more = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} failed: {text}{more}");
    Ok(text)
}

/// A time as wrk writes it.
fn microseconds(text: &str) -> Result<f64> {
    let units = [("us", 1.0), ("ms", 1e3), ("s", 1e6)];
    let found = units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)));
    let (number, factor) = found.with_context(|| format!("no time: {text}"))?;
    Ok(number.parse::<f64>()? * factor)
}
