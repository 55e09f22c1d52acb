//! Runs of programs on packets.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use aya::Ebpf;
use aya::maps::{Array, HashMap, MapData, ProgramArray};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use proxy_common::bench::{FloorKey, FloorValue, Template};

use crate::paths::{self, Client, ENDLESS, Seen};

/// How many runs a figure is of, and how many figures there are of each.
const RUNS: u32 = 400_000;
const ROUNDS: usize = 7;
/// So many flows are begun at a time: fewer than there is room for among those that are not live.
const BATCH: u32 = 20_000;
/// How far the flows of two runs are from each other: odd, and far.
const STEP: u32 = 7_919;

/// The bench's programs, and those of the datapath.
pub struct Runs<'a> {
    datapath: &'a Ebpf,
    bench: Ebpf,
    next: ProgramArray<MapData>,
    /// What the kernel is given; each run begins with the template's bytes.
    frame: [u8; 128],
}

impl<'a> Runs<'a> {
    /// Loads the bench's programs.
    ///
    /// # Errors
    /// If the kernel refuses one.
    pub fn new(object: &[u8], datapath: &'a Ebpf) -> Result<Self> {
        let mut bench = Ebpf::load(object)?;
        for name in ["restore", "empty", "floor"] {
            program_mut(&mut bench, name)?.load().with_context(|| name.to_owned())?;
        }
        let next = ProgramArray::try_from(bench.take_map("next").context("a map")?)?;
        let mut runs = Self { datapath, bench, next, frame: [0; 128] };
        runs.serve_floor()?;
        Ok(runs)
    }

    /// Gives the floor its Service.
    fn serve_floor(&mut self) -> Result<()> {
        let services = self.bench.map_mut("floor_services").context("a map")?;
        let mut services: HashMap<_, FloorKey, FloorValue> = HashMap::try_from(services)?;
        for service in paths::services() {
            let (vip, backend) = (service.frontend, service.backends[0]);
            let (IpAddr::V4(vip), IpAddr::V4(to)) = (vip.ip(), backend.ip()) else { continue };
            let [port, to_port] = [service.frontend.port().to_be(), backend.port().to_be()];
            let dst = bytemuck::cast(vip.octets());
            let key = FloorKey { src: [0; 2], dst, sport: 0, dport: port, proto: 6 };
            let value = FloorValue { address: bytemuck::cast(to.octets()), port: to_port, pad: 0 };
            services.insert(key, value, 0)?;
        }
        Ok(())
    }

    /// Lets these packets of each of so many flows be seen, one after the other, some flows at a time.
    ///
    /// # Errors
    /// If a program can't be run.
    pub fn walk(&mut self, packets: &[Seen], flows: u32) -> Result<()> {
        for first in (0..flows).step_by(BATCH as usize) {
            let count = BATCH.min(flows - first);
            for seen in packets {
                self.lead_to(Some(seen.program))?;
                self.begin_with(seen, first, count, 1)?;
                self.run(count)?;
            }
        }
        Ok(())
    }

    /// Sees to it that the packet becomes what it should.
    ///
    /// # Errors
    /// If it does not.
    pub fn check(&mut self, seen: &Seen) -> Result<()> {
        self.lead_to(Some(seen.program))?;
        self.begin_with(seen, 0, 1, 1)?;
        let (before, after) = (template(seen).0, self.run(1)?.1);
        let Some(wanted) = seen.becomes else {
            ensure!(after[..before.len()] == before, "it was changed");
            return Ok(());
        };
        let octets = match wanted {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let has = |bytes: &[u8]| bytes.windows(octets.len()).any(|window| window == octets);
        ensure!(
            has(&after) && after[..before.len()] != before,
            "it was not translated: {:x?}",
            &after[..before.len()]
        );
        Ok(())
    }

    /// Nanoseconds that the packet's program takes over the one that does nothing: the middle one of some rounds.
    ///
    /// # Errors
    /// If a program can't be run.
    pub fn over_nothing(&mut self, seen: &Seen, flows: u32) -> Result<f64> {
        self.measure(seen, flows, Some(seen.program))
    }

    /// The same of the floor.
    ///
    /// # Errors
    /// If the program can't be run.
    pub fn of_floor(&mut self, seen: &Seen, flows: u32) -> Result<f64> {
        if flows != ENDLESS {
            self.lead_to(None)?;
            self.begin_with(seen, 0, flows, 1)?;
            self.run(flows)?;
        }
        self.measure(seen, flows, None)
    }

    fn measure(&mut self, seen: &Seen, flows: u32, program: Option<&str>) -> Result<f64> {
        let step = if flows == ENDLESS { 1 } else { STEP };
        self.begin_with(seen, 0, flows, step)?;
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            self.next.set(0, program_of(&self.bench, "empty")?.fd()?, 0)?;
            let nothing = self.run(RUNS)?.0;
            self.lead_to(program)?;
            rounds.push(self.run(RUNS)?.0 - nothing);
        }
        rounds.sort_by(f64::total_cmp);
        Ok(rounds[ROUNDS / 2])
    }

    /// From now on that program is run behind the one that restores; the floor if none is named.
    fn lead_to(&mut self, program: Option<&str>) -> Result<()> {
        let program = match program {
            Some(name) => program_of(self.datapath, name)?,
            None => program_of(&self.bench, "floor")?,
        };
        Ok(self.next.set(0, program.fd()?, 0)?)
    }

    /// From now on each run begins with that packet.
    fn begin_with(&mut self, seen: &Seen, first: u32, flows: u32, step: u32) -> Result<()> {
        let (frame, address, port) = template(seen);
        let mut bytes = [0; 128];
        bytes[..frame.len()].copy_from_slice(&frame);
        self.frame = bytes;
        let mut map = Array::try_from(self.bench.map_mut("template").context("a map")?)?;
        Ok(map.set(0, Template { bytes, first, flows, step, address, port }, 0)?)
    }

    /// Runs so often: how long each took, in nanoseconds, and what the packet was in the end.
    fn run(&self, times: u32) -> Result<(f64, Vec<u8>)> {
        let mut out = vec![0; 512];
        let mut options = TestRunOptions::new();
        options.data_in = Some(&self.frame);
        options.data_out = Some(&mut out);
        options.repeat = times;
        let result = program_of(&self.bench, "restore")?.test_run(options)?;
        Ok((result.duration.as_secs_f64() * 1e9, out))
    }
}

/// A packet's bytes, and where in it the number of the client's flow goes: into the last two bytes of the address, and the port.
fn template(seen: &Seen) -> (Vec<u8>, u32, u32) {
    const ETHERNET: u32 = 14;
    let (source, length) = if seen.packet.src.is_ipv6() { (8, 16) } else { (12, 4) };
    let addresses = ETHERNET + source;
    let ports = addresses + 2 * length;
    let (address, port) = match seen.client {
        Client::Source => (addresses + length - 2, ports),
        Client::Destination => (ports - 2, ports + 2),
        // Behind the packet.
        Client::Hidden => (124, 126),
    };
    (seen.packet.frame(), address, port)
}

fn program_of<'a>(programs: &'a Ebpf, name: &str) -> Result<&'a SchedClassifier> {
    Ok(programs.program(name).with_context(|| format!("no program {name}"))?.try_into()?)
}

fn program_mut<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    Ok(programs.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?)
}
