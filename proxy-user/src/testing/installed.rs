//! The datapath on maps of its own, and its programs once more, to be run on packets that no link has.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::maps::{MapData, ProgramArray};
use aya::programs::{Program, SchedClassifier};
use aya::{Ebpf, EbpfLoader};
use ipnet::IpNet;
use proxy_common::settings::{Clock, Guard, Lifetimes, Settings};
use proxy_common::tables::ServiceValue;
use proxy_common::testing::{LINK, MTU, NODE, Service};

use crate::desired::{Access, Backend, Frontend, Port, PortId, Tables};
use crate::kernel::{
    Datapath, Options, Sizes, SocketLb, TcMode, XdpMode, clock, maps_folder, shapes,
};
use crate::model::{IpFamily, ObjectName, Protocol};
use crate::plan::Planner;
use crate::routes::Route;

/// Small tables, pinned below a BPF file system, and nothing attached.
pub fn options(bpffs: &Path) -> Options {
    Options {
        bpffs_root: bpffs.join("portal"),
        cgroup_root: None,
        socket_lb: SocketLb::Off,
        tc: TcMode::Auto,
        xdp: XdpMode::Off,
        sizes: Sizes { flows: 1000, embryos: 1000, ..Sizes::SMALL },
        lifetimes: Lifetimes::DEFAULT,
        takeover_grace: 0,
        masquerade_ports: (32_768, 65_535),
        trace: false,
        short_cut: true,
        catch_all: 0,
        syn_guard: 0,
        vip_ping: true,
        masquerade_all: false,
        masquerade_pods: false,
        cluster_cidrs: Vec::new(),
    }
}

/// The programs of an object once more, on the maps of an installed datapath.
///
/// # Panics
/// If the kernel refuses one.
pub fn load(options: &Options, settings: &Settings, object: &[u8]) -> Ebpf {
    let maps = maps_folder(&options.bpffs_root);
    let pins: Vec<_> = shapes().map(|shape| (shape.name, maps.join(shape.name))).collect();
    let mut loader = EbpfLoader::new();
    loader.override_global("SETTINGS", settings, true);
    loader.override_global("AYA_LOG_LEVEL", &0_u8, true);
    for (name, path) in &pins {
        let size = MapData::from_pin(path).unwrap().info().unwrap().max_entries();
        loader.map_pin_path(name, path).map_max_entries(name, size);
    }
    let mut programs = loader.load(object).unwrap();
    for (name, program) in programs.programs_mut() {
        let taken = match program {
            Program::SchedClassifier(program) => program.load(),
            Program::Xdp(program) => program.load(),
            _ => Ok(()),
        };
        taken.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    fill_tails(&mut programs);
    programs
}

/// The stories' programs, in the order of `datapath::Story`.
const STORIES: [&str; 10] =
    ["pod", "out", "reply", "pending", "arrive", "leave", "settle", "send", "refuse", "icmp"];

fn fill_tails(programs: &mut Ebpf) {
    let mut tails = ProgramArray::try_from(programs.take_map("tails").unwrap()).unwrap();
    for (story, name) in (0..).zip(STORIES) {
        for (family, suffix) in [(0, "4"), (1, "6")] {
            for (kind, prefix) in [(0, ""), (1, "l3")] {
                let name = format!("portal_{prefix}{name}{suffix}");
                if let Some(program) = programs.program(&name) {
                    let program: &SchedClassifier = program.try_into().unwrap();
                    let index = story * 4 + family * 2 + kind;
                    tails.set(index, program.fd().unwrap(), 0).unwrap();
                }
            }
        }
    }
    // The kernel empties a table that nobody holds.
    std::mem::forget(tails);
}

/// The programs once more, on the maps of an installed datapath, to be run on packets.
pub struct Installed {
    /// The datapath.
    pub datapath: Datapath,
    /// What it is to hold.
    pub planner: Planner,
    /// Its programs, attached nowhere.
    pub programs: Ebpf,
    /// The folder of its pins.
    pub root: PathBuf,
}

impl Installed {
    /// A fresh one, with the programs of an object.
    ///
    /// # Panics
    /// If the kernel refuses it.
    pub fn new(options: &Options, object: &[u8]) -> Self {
        Self::with_clock(options, object, clock::clock())
    }

    /// As [`Self::new`], with programs that tell the time by another clock.
    ///
    /// # Panics
    /// If the kernel refuses it.
    pub fn with_clock(options: &Options, object: &[u8], clock: Clock) -> Self {
        let (datapath, planner) = Datapath::install(options).unwrap();
        // On, so that the verifier keeps its code, and never reached.
        let guard = Guard { limit: u32::MAX, key: [0; 4] };
        let programs = load(options, &Settings { clock, guard, ..Settings::DEFAULT }, object);
        Self { datapath, planner, programs, root: options.bpffs_root.clone() }
    }

    /// Serves these Services and no others, and has the node's addresses.
    ///
    /// # Panics
    /// If that can't be written.
    pub fn serve(&mut self, services: &[Service]) {
        let wanted = tables(services);
        let mut refusals = Vec::new();
        // Long enough after any change before.
        let now = Instant::now() + Duration::from_secs(2);
        let held: Vec<PortId> = self.planner.ports().cloned().collect();
        let gone = held.into_iter().filter(|port| !wanted.contains_key(port));
        let changes: Vec<_> = gone
            .map(|port| (port, None))
            .chain(wanted.iter().map(|(port, tables)| (port.clone(), Some(tables.clone()))))
            .collect();
        let backends = services.iter().flat_map(|service| &service.backends);
        let route = |backend: &SocketAddr| {
            let source = NODE[usize::from(backend.is_ipv6())];
            (backend.ip(), Some(Route { source, link: LINK, mtu: MTU, hop: None }))
        };
        self.datapath.set_routes(&backends.map(route).collect());
        let ops = self.planner.plan(now, &changes, &mut refusals);
        self.datapath.apply(&ops).unwrap();
        assert_eq!(refusals, []);
        let marks = NODE.map(|ip| (ip, ServiceValue::NODE | ServiceValue::NODE_PORTS)).into();
        let ops = self.planner.plan_node(&marks);
        self.datapath.apply(&ops).unwrap();
    }
}

/// What the kernel should hold for these Services.
fn tables(services: &[Service]) -> Tables {
    let port = |service: &Service| {
        let protocol = Protocol::from_number(service.proto).unwrap();
        let (vip, port) = (service.frontend.ip(), service.frontend.port());
        let id = PortId {
            service: ObjectName::new("default", &format!("{vip}").replace([':', '.'], "-")),
            port: format!("p{port}"),
            protocol,
            family: IpFamily::of(vip),
        };
        let backend = |address: &SocketAddr| {
            let local = service.local.contains(address);
            Backend {
                address: *address,
                usable: true,
                usable_local: local,
                serving: true,
                local,
                weight: 1,
            }
        };
        let has = |flag| service.flags & flag != 0;
        let access = Access {
            refuses: has(ServiceValue::REFUSES),
            local_for_all: has(ServiceValue::LOCAL_FOR_ALL),
            local_for_outside: has(ServiceValue::LOCAL_FOR_OUTSIDE),
            source_ranges: has(ServiceValue::SOURCE_RANGES),
            host_port: has(ServiceValue::HOST_PORT),
            node_allowed: has(ServiceValue::NODE_ALLOWED),
        };
        let range = |(ip, bits): &(IpAddr, u8)| IpNet::new(*ip, *bits).unwrap().trunc();
        let port = Port {
            frontends: [(Frontend { vip, port, protocol }, access)].into(),
            backends: service.backends.iter().map(backend).collect(),
            source_ranges: service.ranges.iter().map(range).collect(),
            ..Port::default()
        };
        (id, port)
    };
    services.iter().map(port).collect()
}
