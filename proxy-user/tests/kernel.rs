//! The datapath in the kernel: the shared cases by `BPF_PROG_TEST_RUN`, maps, pins and budgets.
//!
//! Each test has a BPF file system of its own, which nobody else sees.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use aya::maps::{Array, HashMap, Map, MapData};
use aya::programs::{Program, SchedClassifier, TestRun, TestRunOptions, Xdp};
use portal::kernel::{
    Datapath, Options, SocketLb, cleanup, clock, maps_folder, name_of, read, shapes,
};
use portal::testing::installed::{self, Installed, options};
use portal::testing::namespace::Mounts;
use portal::testing::program::{lets_pass_with_a_tail_call, stack_of};
use proxy_common::settings::{Clock, Guard, Settings};
use proxy_common::tables::{
    AffinityKey, AffinityValue, EmbryoValue, FlowKey, FlowValue, FragmentKey, FragmentValue,
    Interest, Origin, Side,
};
use proxy_common::testing::{Case, Hook, Packet, Service, Step, cases, search};
use proxy_common::{Family, Outcome, V4, V6, proto};

/// The kernel's codes.
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const TC_ACT_SHOT: i32 = 2;

const BPFFS: &str = "/mnt/bpf";

/// The programs for every packet, and what the kernel's verifier may take of them at most.
const HOOKS: [&str; 9] = [
    "portal_relay",
    "portal_egress",
    "portal_upegress",
    "portal_last",
    "portal_uplast",
    "portal_ingress",
    "portal_uplink",
    "portal_l3egress",
    "portal_l3uplink",
];
const HOOK_BUDGET: u32 = 20_000;
/// The same of the programs that they call. Older verifiers walk further: 6.1 takes 182,152 for the longest.
const STORY_BUDGET: u32 = 250_000;
/// How much of the 512 bytes of stack a program may use: what it calls needs none of it.
const STACK_BUDGET: u32 = 448;
/// How long the machine code of a program for every packet may be, in bytes. Of a packet of no interest the first tenth is run.
const HOT_TEXT: u32 = 14 * 1024;
/// The same of `portal_relay`, most of which is for what begins a flow.
const RELAY_TEXT: u32 = 26 * 1024;

/// Runs a test where there is a fresh BPF file system.
fn on_bpffs<T: Send>(test: impl FnOnce(Options) -> T + Send) -> T {
    let mounts = Mounts::new();
    mounts.bpffs(BPFFS);
    mounts.run(|| test(options(Path::new(BPFFS))))
}

/// The object that the tests were built with.
fn object() -> Vec<u8> {
    let path = std::env::var_os("PORTAL_EBPF_OBJECT").expect("run by `cargo xtask test kernel`");
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", Path::new(&path).display()))
}

/// The programs on the maps of an installed datapath, to be run on packets.
struct Bench(Installed);

impl Bench {
    fn new(options: &Options) -> Self {
        Self(Installed::new(options, &object()))
    }

    fn forget_flows(&self) {
        clear::<FlowKey<V4>, FlowValue<V4>>(&self.0.root, &name_of::<V4>("flows"));
        clear::<FlowKey<V6>, FlowValue<V6>>(&self.0.root, &name_of::<V6>("flows"));
        clear::<FlowKey<V4>, EmbryoValue<V4>>(&self.0.root, &name_of::<V4>("embryos"));
        clear::<FlowKey<V6>, EmbryoValue<V6>>(&self.0.root, &name_of::<V6>("embryos"));
        clear::<AffinityKey<V4>, AffinityValue>(&self.0.root, &name_of::<V4>("affinity"));
        clear::<AffinityKey<V6>, AffinityValue>(&self.0.root, &name_of::<V6>("affinity"));
        clear::<FragmentKey<V4>, FragmentValue>(&self.0.root, &name_of::<V4>("fragments"));
        clear::<FragmentKey<V6>, FragmentValue>(&self.0.root, &name_of::<V6>("fragments"));
    }

    /// How often each outcome was, in the counters and in the records of live flows.
    fn outcomes(&self) -> BTreeMap<Outcome, u64> {
        let mut outcomes = read::outcomes(&self.0.root).unwrap();
        let mut add = |(outcome, packets)| *outcomes.get_mut(&outcome).unwrap() += packets;
        counted::<V4>(&self.0.root).into_iter().for_each(&mut add);
        counted::<V6>(&self.0.root).into_iter().for_each(&mut add);
        outcomes
    }

    /// Whether a packet that comes in by an uplink is dropped at XDP. If it passes, it is untouched; nothing else happens here, where
    /// the kernel knows no neighbours to send it to.
    fn is_dropped_at_xdp(&self, frame: &[u8]) -> bool {
        let program: &Xdp = self.0.programs.program("portal_relay").unwrap().try_into().unwrap();
        let mut out = vec![0; frame.len()];
        let mut run = TestRunOptions::new();
        run.data_in = Some(frame);
        run.data_out = Some(&mut out);
        let code = program.test_run(run).unwrap().return_value;
        assert_eq!(out, frame);
        assert!([XDP_DROP, XDP_PASS].contains(&code), "{code}");
        code == XDP_DROP
    }

    /// A packet is seen at a hook: what is done with it, the kernel's code for that, and what the
    /// packet is then.
    fn see(&self, hook: Hook, frame: &[u8]) -> (Outcome, i32, Vec<u8>) {
        let name = match hook {
            Hook::Ingress => "portal_ingress",
            Hook::Uplink => "portal_uplink",
            Hook::Egress => "portal_upegress",
            Hook::ToPod => "portal_egress",
        };
        let dropped = (hook == Hook::Uplink).then(|| self.is_dropped_at_xdp(frame));
        let program: &SchedClassifier = self.0.programs.program(name).unwrap().try_into().unwrap();
        let before = self.outcomes();
        let mut out = vec![0; frame.len() + 256];
        let mut run = TestRunOptions::new();
        run.data_in = Some(frame);
        run.data_out = Some(&mut out);
        let result = program.test_run(run).unwrap();
        let length = usize::try_from(result.data_size_out).unwrap();
        out.truncate(length);
        let after = self.outcomes();
        // That a table is full is counted beside what becomes of the packet.
        let counted: Vec<Outcome> = after
            .iter()
            .filter(|(o, count)| before[o] != **count && **o != Outcome::TableFull)
            .map(|(o, _)| *o)
            .collect();
        assert_eq!(counted.len(), 1, "one packet, one outcome: {counted:?}");
        if dropped == Some(true) {
            assert_eq!(result.return_value.cast_signed(), TC_ACT_SHOT, "XDP does what tc does");
        }
        (counted[0], result.return_value.cast_signed(), out)
    }
}

/// What the records of live flows have counted.
fn counted<F: Family>(root: &Path) -> Vec<(Outcome, u64)> {
    let map = MapData::from_pin(maps_folder(root).join(name_of::<F>("flows"))).unwrap();
    let table =
        HashMap::<_, FlowKey<F>, FlowValue<F>>::try_from(Map::from_map_data(map).unwrap()).unwrap();
    let records = table.iter().map(|record| record.unwrap().1);
    records.map(|record| (record.facts().origin.outcome(), record.packets.into())).collect()
}

fn clear<K: aya::Pod, V: aya::Pod>(root: &Path, map: &str) {
    let map = MapData::from_pin(maps_folder(root).join(map)).unwrap();
    let map = Map::from_map_data(map).unwrap();
    let mut table = HashMap::<_, K, V>::try_from(map).unwrap();
    let keys: Vec<K> = table.keys().map(Result::unwrap).collect();
    keys.iter().for_each(|key| table.remove(key).unwrap());
}

/// The code of tc that goes with an outcome: on, out of the link it came from, or dropped.
fn verdict(outcome: Outcome) -> i32 {
    match outcome {
        Outcome::ShortCut
        | Outcome::Hairpin
        | Outcome::Reset
        | Outcome::Unreachable
        | Outcome::EchoReply => 7,
        Outcome::FragmentUnknown
        | Outcome::NoLocal
        | Outcome::NotAllowed
        | Outcome::NoSource
        | Outcome::Silent
        | Outcome::NoPort
        | Outcome::NotWritable => 2,
        _ => -1,
    }
}

fn run(bench: &mut Bench, case: &Case) {
    bench.forget_flows();
    for (number, step) in case.steps.iter().enumerate() {
        let place = format!("{}, step {number}", case.name);
        match step {
            Step::Services(services) => bench.0.serve(services),
            Step::Packet { hook, frame, outcome, becomes } => {
                if *hook == Hook::Uplink
                    && [Outcome::NoLocal, Outcome::NotAllowed].contains(outcome)
                {
                    assert!(bench.is_dropped_at_xdp(frame), "{place}");
                }
                let (done, code, bytes) = bench.see(*hook, frame);
                assert_eq!((done, code), (*outcome, verdict(*outcome)), "{place}");
                becomes.check(&place, frame, &bytes);
            }
        }
    }
}

#[test]
fn every_case_is_as_on_the_host() {
    on_bpffs(|options| {
        let mut bench = Bench::new(&options);
        cases().iter().for_each(|case| run(&mut bench, case));
    });
}

impl search::Datapath for Bench {
    type Frame = Vec<u8>;
    // The kernel's test runs begin with a packet without any.
    const CARRIES_NOTES: bool = false;

    fn serve(&mut self, services: &[Service]) {
        self.0.serve(services);
    }

    fn frame(&self, bytes: &[u8]) -> Vec<u8> {
        bytes.to_vec()
    }

    fn bytes(&self, frame: &Vec<u8>) -> Vec<u8> {
        frame.clone()
    }

    fn see(&mut self, hook: Hook, frame: &mut Vec<u8>) -> Outcome {
        let (outcome, _, bytes) = Self::see(self, hook, frame);
        *frame = bytes;
        outcome
    }

    // The kernel's LRU tables are large enough.
    fn lose(&mut self, _rng: &mut fastrand::Rng) {}
}

/// As on the host, where there are many more, and time goes on. Here it stands still: how long all this takes depends on the machine, and
/// the kernel carries no notes from one test run to the next, by which a flow is known where it leaves that was taken for over.
#[test]
fn random_packets_become_what_a_model_says() {
    on_bpffs(|options| {
        for is_v6 in [false, true] {
            let stopped = Clock::new(1, 1 << 40);
            let mut bench = Bench(Installed::with_clock(&options, &object(), stopped));
            bench.forget_flows();
            search::search(&mut bench, is_v6, 1, 2_000);
        }
    });
}

#[test]
fn what_is_not_ip_is_not_touched() {
    on_bpffs(|options| {
        let bench = Bench::new(&options);
        let mut arp = vec![0xff; 60];
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        for hook in [Hook::Ingress, Hook::Uplink, Hook::Egress] {
            assert_eq!(bench.see(hook, &arp), (Outcome::NotIp, -1, arp.clone()));
        }
    });
}

#[test]
fn with_a_full_table_of_live_flows_others_are_served_all_the_same() {
    on_bpffs(|mut options| {
        options.sizes.flows = 8;
        let mut bench = Bench::new(&options);
        let (vip, pod) = (at("10.96.0.1:80"), at("10.0.1.1:8080"));
        bench.0.serve(&[Service::new(vip, proto::UDP, &[pod])]);
        let send =
            |client| bench.see(Hook::Ingress, &Packet::udp(Side::Ingress, client, vip).frame()).0;
        let answer =
            |client| bench.see(Hook::Egress, &Packet::udp(Side::Egress, pod, client).frame()).0;
        let clients = || (1..=100).map(|host| SocketAddr::from(([10, 0, 0, host], 4000)));
        for client in clients() {
            assert_eq!((send(client), answer(client)), (Outcome::Opened, Outcome::Replied));
        }
        let live = clients().filter(|client| send(*client) == Outcome::Established).count();
        assert!((1..50).contains(&live), "{live} flows in 8 records");
        assert!(read::outcomes(&options.bpffs_root).unwrap()[&Outcome::TableFull] >= 50);
        for client in clients() {
            assert_eq!((send(client), answer(client)), (Outcome::Forwarded, Outcome::Replied));
        }
    });
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// The records of live flows.
fn live_flows(options: &Options) -> HashMap<MapData, FlowKey<V4>, FlowValue<V4>> {
    let path = maps_folder(&options.bpffs_root).join("flows_v4");
    HashMap::try_from(Map::HashMap(MapData::from_pin(path).unwrap())).unwrap()
}

/// By the kernel's count of jiffies, which is at most one behind.
#[test]
fn the_programs_clock_is_the_agents() {
    assert_ne!(clock::clock(), Clock::PRECISE);
    on_bpffs(|options| {
        let mut bench = Bench::new(&options);
        let (vip, pod) = (at("10.96.0.1:80"), at("10.0.1.1:8080"));
        bench.0.serve(&[Service::new(vip, proto::UDP, &[pod])]);
        let client = at("10.0.0.1:4000");
        let before = read::now();
        for _ in 0..2 {
            bench.see(Hook::Ingress, &Packet::udp(Side::Ingress, client, vip).frame());
            bench.see(Hook::Egress, &Packet::udp(Side::Egress, pod, client).frame());
        }
        let ticks = before - 1..=read::now();
        let records: Vec<_> = live_flows(&options).iter().map(|record| record.unwrap().1).collect();
        assert_eq!(records.len(), 2);
        assert!(
            records.iter().all(|record| ticks.contains(&record.seen)),
            "{ticks:?}: {records:?}"
        );
    });
}

#[test]
fn the_sweep_removes_what_has_ended_and_nothing_else() {
    on_bpffs(|options| {
        let mut bench = Bench::new(&options);
        let (vip, pod) = (at("10.96.0.1:80"), at("10.0.1.1:8080"));
        bench.0.serve(&[Service::new(vip, proto::UDP, &[pod])]);
        for client in [at("10.0.0.1:4000"), at("10.0.0.2:4000"), at("10.0.0.3:4000")] {
            for _ in 0..3 {
                bench.see(Hook::Ingress, &Packet::udp(Side::Ingress, client, vip).frame());
                bench.see(Hook::Egress, &Packet::udp(Side::Egress, pod, client).frame());
            }
        }
        assert_eq!(bench.0.datapath.sweep().run().unwrap().removed, 0);
        let mut flows = live_flows(&options);
        let all: Vec<_> = flows.iter().map(Result::unwrap).collect();
        assert_eq!(all.len(), 6);
        // One direction of the first client's flow has ended, both of the second's; of the third's one is
        // lost and the other has ended.
        for (key, value) in all {
            let of_client = |a: &proxy_common::Addr4| a.octets[..3] == [10, 0, 0];
            let host = [key.src, key.dst].into_iter().find(of_client).unwrap();
            let is_reply = value.kind & Origin::REPLY != 0;
            match (host.octets[3], is_reply) {
                (1, true) => {}
                (3, false) => flows.remove(&key).unwrap(),
                _ => {
                    let seen = value.seen.wrapping_sub(options.lifetimes.udp_stream + 1);
                    flows.insert(key, FlowValue { seen, ..value }, 0).unwrap();
                }
            }
        }
        // What the records alone have counted is not lost with them.
        let (before, seen) = (read::outcomes(&bench.0.root).unwrap(), bench.outcomes());
        let swept = bench.0.datapath.sweep().run().unwrap();
        assert_eq!((swept.records, swept.removed), ([2, 0], 3));
        assert!(
            read::outcomes(&bench.0.root).unwrap()[&Outcome::Replied] > before[&Outcome::Replied]
        );
        assert_eq!(bench.outcomes(), seen);
        let left: Vec<_> = flows.keys().map(Result::unwrap).collect();
        assert!(
            left.len() == 2 && left.iter().all(|k| k.src.octets[3] == 1 || k.dst.octets[3] == 1)
        );
    });
}

/// What bpftool prints.
fn bpftool(arguments: &[&str]) -> String {
    let output = Command::new("bpftool").args(arguments).output().expect("bpftool is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_verifier_needs_no_more_than_its_budget() {
    on_bpffs(|options| {
        let _maps = Bench::new(&options);
        // With everything switched on: what is off is not looked at.
        let all = Settings {
            masquerade_all: 1,
            masquerade_pods: 1,
            short_cut: 1,
            catch_all: 1,
            guard: Guard { limit: 1, key: [1, 2, 3, 4] },
            clock: clock::clock(),
            ..Settings::DEFAULT
        };
        let full = installed::load(&options, &all, &object());
        println!("program            verified  stack  bytes of machine code");
        let mut beyond = Vec::new();
        for (name, program) in full.programs() {
            let (info, fd) = match program {
                Program::SchedClassifier(program) => (program.info(), program.fd()),
                Program::Xdp(program) => (program.info(), program.fd()),
                _ => continue,
            };
            // 5.16 and later tell.
            let verified = info.as_ref().unwrap().verified_instruction_count().unwrap_or_default();
            let (text, stack) = (info.unwrap().size_jitted(), stack_of(fd.unwrap()).unwrap());
            println!("{name:18} {verified:8} {stack:6} {text:6}");
            let is_hot = HOOKS.contains(&name);
            let budget = if is_hot { HOOK_BUDGET } else { STORY_BUDGET };
            let most = if name == "portal_relay" { RELAY_TEXT } else { HOT_TEXT };
            let fits = verified <= budget && (!is_hot || text <= most);
            if !fits || !(1..=STACK_BUDGET).contains(&stack) {
                beyond.push(name);
            }
        }
        assert_eq!(
            beyond, [""; 0],
            "these need more than {HOT_TEXT} bytes ({RELAY_TEXT} at XDP), {HOOK_BUDGET} or {STORY_BUDGET} instructions verified, or {STACK_BUDGET} bytes of stack"
        );
    });
}

/// What the kernel shows of a program of someone else's, which may call another one.
#[test]
fn a_program_with_a_tail_call_may_end_the_chain() {
    on_bpffs(|options| {
        let _maps = Bench::new(&options);
        let links = std::fs::read_dir(options.bpffs_root.join("links")).unwrap();
        let mut paths = links.map(|entry| entry.unwrap().path());
        let is_table =
            |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("tails-");
        let table = paths.find(is_table).unwrap();
        assert!(!lets_pass_with_a_tail_call(&table).unwrap());
    });
}

#[test]
fn maps_are_pinned_by_name_and_show_their_fields_to_bpftool() {
    on_bpffs(|options| {
        let mut bench = Bench::new(&options);
        bench.0.serve(&[Service::new(at("10.96.0.1:80"), proto::TCP, &[at("10.0.1.1:8080")])]);
        let maps = maps_folder(&options.bpffs_root);
        for shape in shapes() {
            let info = MapData::from_pin(maps.join(shape.name)).unwrap().info().unwrap();
            let sizes = (info.key_size() as usize, info.value_size() as usize);
            assert_eq!(sizes, (shape.key, shape.value), "{}", shape.name);
        }
        let path = |map: &str| maps.join(map).display().to_string();
        let dump = |map: &str| bpftool(&["map", "dump", "pinned", &path(map)]);
        for (map, fields) in [
            ("services_v4", ["vip", "proto", "cluster", "flags"]),
            ("names", ["namespace", "service", "port", "proto"]),
        ] {
            let text = dump(map);
            for field in fields {
                assert!(text.contains(&format!("\"{field}\"")), "{map} has no {field}: {text}");
            }
        }
    });
}

/// As an agent may leave the maps that was cut off while it cleaned up.
#[test]
fn a_successor_sets_the_bits_of_what_it_finds() {
    on_bpffs(|options| {
        let (vip, pod) = (at("10.96.0.1:80"), at("10.0.1.1:8080"));
        let syn = Packet::tcp(Side::Ingress, at("10.0.0.1:4000"), vip, 2).frame();
        let mut bench = Bench::new(&options);
        bench.0.serve(&[Service::new(vip, proto::TCP, &[pod])]);
        let path = maps_folder(&options.bpffs_root).join("interest_v4");
        let map = Map::Array(MapData::from_pin(path).unwrap());
        let mut spots = Array::<_, Interest>::try_from(map).unwrap();
        for element in 0..spots.len() {
            spots.set(element, Interest { words: [0; 4] }, 0).unwrap();
        }
        assert_eq!(bench.see(Hook::Ingress, &syn).0, Outcome::NotService);
        drop(bench);
        let bench = Bench::new(&options);
        assert_eq!(bench.see(Hook::Ingress, &syn).0, Outcome::Opened);
    });
}

#[test]
fn a_successor_takes_over_and_a_second_agent_is_refused() {
    on_bpffs(|options| {
        let (first, _) = Datapath::install(&options).unwrap();
        let error = Datapath::install(&options).err().unwrap().to_string();
        assert!(error.contains("another portal is running"), "{error}");
        drop(first);
        let (_second, planner) = Datapath::install(&options).unwrap();
        assert_eq!(planner.ports().count(), 0);
    });
}

#[test]
fn maps_of_another_layout_are_refused_with_advice_and_cleanup_removes_them() {
    on_bpffs(|options| {
        let maps = maps_folder(&options.bpffs_root);
        drop(Datapath::install(&options).unwrap());
        // As if it were another version's.
        std::fs::rename(maps.join("config"), maps.join("kept")).unwrap();
        std::fs::rename(maps.join("names"), maps.join("config")).unwrap();
        let error = format!("{:#}", Datapath::install(&options).err().unwrap());
        assert!(error.contains("portal cleanup"), "{error}");
        cleanup(&options.bpffs_root).unwrap();
        assert!(!options.bpffs_root.exists());
        drop(Datapath::install(&options).unwrap());
    });
}

#[test]
fn what_is_missing_is_said_and_nothing_is_left() {
    let mounts = Mounts::new();
    mounts.run(|| {
        let error = Datapath::install(&options(Path::new(BPFFS))).err().unwrap().to_string();
        assert!(error.contains("mount -t bpf"), "{error}");
    });
    on_bpffs(|options| {
        let elsewhere = Some(PathBuf::from("/mnt"));
        let wrong =
            Options { cgroup_root: elsewhere, socket_lb: SocketLb::Host, ..options.clone() };
        let error = Datapath::install(&wrong).err().unwrap().to_string();
        assert!(error.contains("cgroup2") && error.contains("--socket-lb=off"), "{error}");
        assert!(!options.bpffs_root.exists());
    });
}
