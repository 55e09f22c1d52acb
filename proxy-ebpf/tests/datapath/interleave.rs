//! Two CPUs: two packets whose stories are told at once, in every order of their accesses to the tables of
//! flows. Where there are too many orders, all those with a few changes from one CPU to the other.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use proxy_common::settings::{Settings, ticks};
use proxy_common::tables::Side::{Egress, Ingress};
use proxy_common::tables::{
    AffinityKey, AffinityValue, Algorithm, Arrivals, Backend, EmbryoRecord, EmbryoValue, ExitKey,
    FlowKey, FlowRecord, FlowValue, FragmentKey, FragmentValue, Kinds, PeerKey, PeerValue,
    ServiceKey, SourceRange, Way, Work,
};
use proxy_common::testing::{Hook, NODE, Packet, Service, ends};
use proxy_common::{Addr4, Outcome, Port, V4, proto};
use proxy_ebpf::datapath::{self, Refused, Tables};
use proxy_ebpf::testing::{Buffer, Host, see};

use crate::{ACK, FIN, SYN, at, client, pod, vip};

/// Orders that are tried of one pair of packets, at most, before only few changes are allowed.
const MANY: usize = 1_500;
/// How many changes from one CPU to the other there are at most then.
const CHANGES: usize = 3;

/// Whose turn it is, and what was decided at each access so far.
struct Turns {
    running: AtomicUsize,
    ended: [AtomicUsize; 2],
    plan: Vec<usize>,
    /// Who went on at each access, and whether it could have been the other.
    taken: std::sync::Mutex<Vec<(usize, bool)>>,
}

const NOBODY: usize = 2;

impl Turns {
    fn new(plan: Vec<usize>) -> Self {
        let first = plan.first().copied().unwrap_or(0);
        let ended = [AtomicUsize::new(0), AtomicUsize::new(0)];
        let taken = std::sync::Mutex::new(vec![(first, true)]);
        Self { running: AtomicUsize::new(first), ended, plan, taken }
    }

    /// Before an access of CPU `me`: the plan says who goes on, then whoever runs.
    fn pass(&self, me: usize) {
        self.hand_on(me);
        self.wait(me);
    }

    fn wait(&self, me: usize) {
        while self.running.load(Ordering::Acquire) != me {
            thread::yield_now();
        }
    }

    fn hand_on(&self, me: usize) {
        let mut taken = self.taken.lock().unwrap();
        let other_runs = self.ended[1 - me].load(Ordering::Relaxed) == 0;
        let i_run = self.ended[me].load(Ordering::Relaxed) == 0;
        let wanted = self.plan.get(taken.len()).copied().unwrap_or(me);
        let next = match (i_run, other_runs) {
            (true, true) => wanted,
            (true, false) => me,
            (false, true) => 1 - me,
            (false, false) => NOBODY,
        };
        taken.push((next, i_run && other_runs));
        drop(taken);
        self.running.store(next, Ordering::Release);
    }

    fn end(&self, me: usize) {
        self.ended[me].store(1, Ordering::Relaxed);
        self.hand_on(me);
    }
}

/// The tables as one of two CPUs sees them.
struct Cpu<'a> {
    host: &'a Host<V4>,
    turns: &'a Turns,
    number: usize,
}

// SAFETY: only the CPU whose turn it is touches the host's tables.
unsafe impl Send for Cpu<'_> {}

macro_rules! passing {
    ($($name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)+) => {$(
        fn $name(&self, $($argument: $type),*) $(-> $result)? {
            self.turns.pass(self.number);
            self.host.$name($($argument),*)
        }
    )+};
}

macro_rules! free {
    ($($name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)+) => {$(
        fn $name(&self, $($argument: $type),*) $(-> $result)? {
            Tables::<V4>::$name(self.host, $($argument),*)
        }
    )+};
}

impl Tables<V4> for Cpu<'_> {
    passing! {
        flow(key: &FlowKey<V4>) -> Option<FlowRecord<'_, V4>>;
        embryo(key: &FlowKey<V4>) -> Option<EmbryoRecord<'_, V4>>;
        insert_flow(key: &FlowKey<V4>, value: &FlowValue<V4>) -> Result<(), Refused>;
        replace_flow(key: &FlowKey<V4>, value: &FlowValue<V4>);
        wish(key: &FlowKey<V4>);
        insert_embryo(key: &FlowKey<V4>, value: &EmbryoValue<V4>) -> Result<(), Refused>;
        put_embryo(key: &FlowKey<V4>, value: &EmbryoValue<V4>);
        remove(key: &FlowKey<V4>);
        remove_embryo(key: &FlowKey<V4>);
    }

    free! {
        now() -> u32;
        microseconds() -> u32;
        random() -> u32;
        count(outcome: Outcome, times: u32);
        service(key: &ServiceKey<V4>) -> Option<datapath::Service>;
        has_service(key: &ServiceKey<V4>) -> bool;
        slot(index: u32) -> Option<u32>;
        backend(number: u32) -> Option<Backend<V4>>;
        way(number: u32) -> Option<Way<V4>>;
        interest(address: &Addr4) -> Kinds;
        is_server(address: &Addr4, port: Port) -> bool;
        take_port(port: Port);
        is_port(port: Port) -> bool;
        forget_peer(key: &PeerKey<V4>);
        load(backend: u32) -> u32;
        count_flow(backend: u32, more: bool);
        turn(service: u32) -> u32;
        affinity(key: &AffinityKey<V4>) -> Option<AffinityValue>;
        remember_affinity(key: &AffinityKey<V4>, value: &AffinityValue);
        is_in_range(key: &SourceRange<V4>) -> bool;
        is_pod(address: &Addr4) -> bool;
        exit(key: &ExitKey<V4>) -> Option<Addr4>;
        count_traffic(service: u32, packets: u32, bytes: u32);
        next_port(destination: u32) -> u32;
        exhausted(backend: u32);
        arrivals() -> Arrivals;
        count_arrival(now: u32) -> u32;
        verified(key: &FlowKey<V4>) -> Option<u32>;
        verify(key: &FlowKey<V4>, now: u32);
        fragment(key: &FragmentKey<V4>) -> Option<FragmentValue>;
        remember_fragment(key: &FragmentKey<V4>, value: FragmentValue);
        peer(key: &PeerKey<V4>) -> Option<PeerValue<V4>>;
        remember_peer(key: &PeerKey<V4>, value: &PeerValue<V4>);
    }

    fn setting<T: Copy>(&self, field: impl Fn(&Settings) -> &T) -> T {
        Tables::<V4>::setting(self.host, field)
    }
}

type Sent = (Hook, Packet);

/// What each of two packets has become.
type Both = [(Outcome, Vec<u8>); 2];

/// Lets two packets be seen at once in the order that `plan` begins with. Also says which order it was.
fn at_once(host: &Host<V4>, packets: &[Sent; 2], plan: Vec<usize>) -> (Both, Vec<(usize, bool)>) {
    let turns = Turns::new(plan);
    let seen = thread::scope(|scope| {
        let run = |number: usize| {
            let cpu = Cpu { host, turns: &turns, number };
            let (hook, packet) = &packets[number];
            let mut buffer = Buffer::new(&packet.frame());
            scope.spawn(move || {
                let cpu = cpu;
                let mut work: Work<V4> = bytemuck::Zeroable::zeroed();
                cpu.turns.wait(cpu.number);
                let outcome = see(&cpu, *hook, &mut buffer, &mut work).outcome;
                cpu.turns.end(cpu.number);
                (outcome, buffer.bytes)
            })
        };
        [0, 1].map(run).map(|thread| thread.join().expect("no panic"))
    });
    (seen, turns.taken.into_inner().unwrap())
}

/// The next order after `taken` with at most so many changes of the CPU; `None` if that was the last.
fn next(taken: &[(usize, bool)], changes: usize) -> Option<Vec<usize>> {
    for position in (0..taken.len()).rev() {
        let (who, is_free) = taken[position];
        // CPU 0 comes first at each access, then CPU 1.
        let default = if position == 0 { 0 } else { taken[position - 1].0 };
        if !is_free || who != default {
            continue;
        }
        let mut plan: Vec<usize> = taken[..position].iter().map(|(who, _)| *who).collect();
        plan.push(1 - who);
        let forced = |at: usize| taken.get(at).is_some_and(|(_, is_free)| !is_free);
        let count = (1..plan.len()).filter(|at| plan[*at] != plan[at - 1] && !forced(*at)).count();
        if count <= changes {
            return Some(plan);
        }
    }
    None
}

/// Tries every order of two packets on a host that `prepare` makes, and lets `check` look at what came of it.
fn in_every_order(
    prepare: impl Fn() -> Host<V4>,
    packets: &[Sent; 2],
    check: impl Fn(&Host<V4>, &Both, &str),
) {
    for changes in [usize::MAX, CHANGES] {
        let (mut plan, mut orders) = (Some(vec![0]), 0);
        while let Some(order) = plan {
            let host = prepare();
            let (both, taken) = at_once(&host, packets, order);
            let place: Vec<usize> = taken.iter().map(|(who, _)| *who).collect();
            check(&host, &both, &format!("order {place:?}"));
            orders += 1;
            if changes == usize::MAX && orders == MANY {
                break;
            }
            plan = next(&taken, changes);
        }
        if changes == CHANGES || orders < MANY {
            println!("{orders} orders tried");
            return;
        }
    }
}

fn pods() -> Vec<SocketAddr> {
    (1..=8).map(|number| SocketAddr::from(([10, 0, 1, number], 8080))).collect()
}

fn serving(proto: u8, by: Algorithm) -> Host<V4> {
    let mut host = Host::new();
    host.serve(&[Service { flags: by.flags(), ..Service::new(vip(), proto, &pods()) }]);
    host
}

fn request(flags: u8) -> Sent {
    (Hook::Ingress, Packet::tcp(Ingress, client(), vip(), flags))
}

fn reply(flags: u8) -> Sent {
    (Hook::Egress, Packet::tcp(Egress, pod(), client(), flags))
}

fn datagram() -> Sent {
    (Hook::Ingress, Packet::udp(Ingress, client(), vip()))
}

fn tell(host: &Host<V4>, (hook, packet): &Sent) -> (Outcome, [SocketAddr; 2]) {
    let (outcome, frame) = host.see(*hook, &packet.frame());
    (outcome, ends(&frame))
}

/// One flow has one place: both packets and the next one go the same way, and its answers come back.
fn is_one_flow(host: &Host<V4>, both: &Both, next: &Sent, place: &str) {
    let [first, second] = both.each_ref().map(|(_, frame)| ends(frame));
    assert_eq!(first, second, "{place}");
    let (_, third) = tell(host, next);
    assert_eq!(third, first, "{place}");
    let [seen_as, chosen] = third;
    let answer = Packet { side: Egress, src: chosen, dst: seen_as, ..next.1.clone() };
    assert_eq!(tell(host, &(Hook::Egress, answer)).1, [vip(), client()], "{place}");
}

/// Neither half of a flow is alone among live ones.
fn is_whole(host: &Host<V4>, place: &str) {
    let live = host.live();
    for (key, value) in &live {
        let other = live.iter().find(|(other, _)| *other == value.other);
        assert!(other.is_some_and(|(_, other)| other.other == *key), "{place}: {key:?} is alone");
    }
}

/// R4: the first two datagrams of one socket.
#[test]
fn two_first_datagrams_open_one_flow() {
    for by in [Algorithm::Maglev, Algorithm::Random, Algorithm::RoundRobin] {
        in_every_order(
            || serving(proto::UDP, by),
            &[datagram(), datagram()],
            |host, both, place| is_one_flow(host, both, &datagram(), &format!("{by:?}, {place}")),
        );
    }
}

/// Two clients from one port, whose common place an older flow has had.
#[test]
fn two_clients_never_get_one_place() {
    let from = |host| SocketAddr::from(([198, 51, 100, host], 50_000));
    let to = SocketAddr::new(NODE[0], 30_080);
    let syn = |host| Packet::tcp(Ingress, from(host), to, SYN).frame();
    let leaves = |host| (Hook::Egress, Packet::tcp(Egress, from(host), pod(), SYN));
    let prepare = || {
        let mut host = Host::new();
        let door = at("0.0.0.0:30080");
        host.serve(&[Service { flags: 0, ..Service::new(door, proto::TCP, &[pod()]) }]);
        host.pass(&syn(1));
        host.now.set(host.now.get() + ticks(300));
        for client in [2, 3] {
            host.see(Hook::Uplink, &syn(client));
        }
        host
    };
    in_every_order(prepare, &[leaves(2), leaves(3)], |host, both, place| {
        let seen_as = both.each_ref().map(|(_, frame)| ends(frame)[0]);
        assert_ne!(seen_as[0], seen_as[1], "{place}");
        for (number, seen_as) in (2..).zip(seen_as) {
            let answer = Packet::tcp(Ingress, pod(), seen_as, SYN | ACK).frame();
            assert_eq!(ends(&host.pass(&answer).1), [to, from(number)], "{place}");
        }
    });
}

/// A SYN and its retransmission.
#[test]
fn two_syns_open_one_flow() {
    for by in [Algorithm::Maglev, Algorithm::Random, Algorithm::RoundRobin] {
        in_every_order(
            || serving(proto::TCP, by),
            &[request(SYN), request(SYN)],
            |host, both, place| is_one_flow(host, both, &request(SYN), &format!("{by:?}, {place}")),
        );
    }
}

/// The same where a connection from that port has ended before.
#[test]
fn two_syns_after_a_connection_has_ended_open_one_flow() {
    let prepare = || {
        let mut host = serving_one();
        connect(&host);
        tell(&host, &request(FIN | ACK));
        tell(&host, &reply(FIN | ACK));
        host.serve(&[Service::new(vip(), proto::TCP, &[at("10.0.1.9:8080")])]);
        host
    };
    in_every_order(prepare, &[request(SYN), request(SYN)], |host, both, place| {
        is_one_flow(host, both, &request(SYN), place);
    });
}

fn serving_one() -> Host<V4> {
    let mut host = Host::new();
    host.serve(&[Service::new(vip(), proto::TCP, &[pod()])]);
    host
}

fn connect(host: &Host<V4>) {
    for sent in [request(SYN), reply(SYN | ACK), request(ACK)] {
        tell(host, &sent);
    }
    assert_eq!(host.flows(), 2);
}

/// A retransmitted SYN meets the answer to the first one.
#[test]
fn a_syn_and_an_answer_at_once() {
    let prepare = || {
        let host = serving_one();
        tell(&host, &request(SYN));
        host
    };
    in_every_order(prepare, &[request(SYN), reply(SYN | ACK)], |host, both, place| {
        assert_eq!(ends(&both[1].1), [vip(), client()], "{place}");
        assert_eq!(tell(host, &request(ACK)), (Outcome::Established, [client(), pod()]), "{place}");
        is_whole(host, place);
    });
}

/// R5: the client's retransmission while its acknowledgement makes the flow live.
#[test]
fn a_flow_becomes_live_while_its_client_sends_again() {
    for by in [Algorithm::Maglev, Algorithm::Random, Algorithm::RoundRobin] {
        for other in [SYN, ACK] {
            let prepare = || {
                let host = serving(proto::TCP, by);
                let chosen = tell(&host, &request(SYN)).1[1];
                let answer = Packet::tcp(Egress, chosen, client(), SYN | ACK);
                tell(&host, &(Hook::Egress, answer));
                host
            };
            in_every_order(prepare, &[request(ACK), request(other)], |host, both, place| {
                let place = &format!("{by:?}, {place}");
                is_one_flow(host, both, &request(ACK), place);
                is_whole(host, place);
                assert_eq!(host.flows(), 2, "{place}");
            });
        }
    }
    // The same of datagrams.
    let prepare = || {
        let host = serving(proto::UDP, Algorithm::Random);
        let chosen = tell(&host, &datagram()).1[1];
        tell(&host, &(Hook::Egress, Packet::udp(Egress, chosen, client())));
        host
    };
    in_every_order(prepare, &[datagram(), datagram()], |host, both, place| {
        is_one_flow(host, both, &datagram(), place);
        is_whole(host, place);
    });
}

/// R6: two CPUs make a flow live while the table is nearly full.
#[test]
fn a_nearly_full_table_never_keeps_half_a_flow() {
    for capacity in [0, 1, 2] {
        let prepare = || {
            let mut host = serving_one();
            tell(&host, &request(SYN));
            tell(&host, &reply(SYN | ACK));
            host.capacity = capacity;
            host
        };
        in_every_order(prepare, &[request(ACK), request(ACK)], |host, both, place| {
            is_one_flow(host, both, &request(ACK), place);
            is_whole(host, place);
        });
    }
}

/// R7: both sides finish at once.
#[test]
fn both_sides_finish_at_once() {
    let prepare = || {
        let host = serving_one();
        connect(&host);
        host
    };
    in_every_order(prepare, &[request(FIN | ACK), reply(FIN | ACK)], |host, both, place| {
        let there_and_back = both.each_ref().map(|(_, frame)| ends(frame));
        assert_eq!(there_and_back, [[client(), pod()], [vip(), client()]], "{place}");
        // The last acknowledgements.
        for sent in [request(ACK), reply(ACK)] {
            tell(host, &sent);
        }
        assert_eq!(host.flows(), 0, "{place}");
        assert_eq!(tell(host, &request(SYN)), (Outcome::Opened, [client(), pod()]), "{place}");
    });
}

/// R1 and R3 of the agent's sweep and of eviction: a record that goes while a packet looks at it.
#[test]
fn a_flow_that_has_ended_makes_way_while_its_successor_comes() {
    let prepare = || {
        let host = serving_one();
        connect(&host);
        host.now.set(host.now.get() + ticks(25 * 3600));
        host
    };
    in_every_order(prepare, &[request(SYN), reply(ACK)], |host, both, place| {
        assert_eq!(ends(&both[0].1), [client(), pod()], "{place}");
        assert_eq!(tell(host, &reply(SYN | ACK)).1, [vip(), client()], "{place}");
        assert_eq!(tell(host, &request(ACK)).1, [client(), pod()], "{place}");
    });
}
