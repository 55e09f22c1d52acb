//! How a new flow's backend is chosen, algorithm by algorithm. How slots are filled is in
//! `portal::plan`: here every backend has one.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use proxy_common::tables::Algorithm;
use proxy_common::tables::Side::{Egress, Ingress};
use proxy_common::testing::{Hook, Packet, Service};
use proxy_common::{V4, proto};
use proxy_ebpf::testing::Host;

use crate::{ACK, FIN, SYN, vip};

/// A host that leads the VIP to four backends.
fn choosing(by: Algorithm, proto: u8) -> Host<V4> {
    let mut host = Host::new();
    let backends: Vec<SocketAddr> = (1..=4).map(backend).collect();
    let flags = by.flags();
    host.serve(&[Service { flags, ..Service::new(vip(), proto, &backends) }]);
    host
}

fn backend(number: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 1, number], 80))
}

/// The backend that a client's packet gets to.
fn reached(host: &Host<V4>, packet: &Packet) -> IpAddr {
    let after = host.see(Hook::Ingress, &packet.frame()).1;
    IpAddr::from([after[30], after[31], after[32], after[33]])
}

fn datagram(client: [u8; 4], port: u16) -> Packet {
    Packet::udp(Ingress, SocketAddr::from((client, port)), vip())
}

fn counts(reached: impl Iterator<Item = IpAddr>) -> BTreeMap<IpAddr, u32> {
    let mut counts = BTreeMap::new();
    reached.for_each(|backend| *counts.entry(backend).or_default() += 1);
    counts
}

#[test]
fn every_algorithm_spreads_clients_over_all_backends() {
    for by in Algorithm::ALL {
        let host = choosing(by, proto::UDP);
        let of_one = counts((1000..1100).map(|p| reached(&host, &datagram([10, 0, 0, 9], p))));
        assert_eq!(of_one.len(), if by == Algorithm::SourceHash { 1 } else { 4 }, "{by:?}");
        let clients = (0..4000_u16).map(u16::to_be_bytes);
        let all = counts(clients.map(|[a, b]| reached(&host, &datagram([10, 1, a, b], 5000))));
        // 1,000 each, with a standard deviation of 27 where it is left to chance.
        assert!(all.len() == 4 && all.values().all(|n| (850..1150).contains(n)), "{by:?}: {all:?}");
    }
}

#[test]
fn maglev_and_source_hash_choose_alike_on_every_node() {
    for by in [Algorithm::Maglev, Algorithm::SourceHash] {
        let (one, mut other) = (choosing(by, proto::UDP), choosing(by, proto::UDP));
        other.settings.seed = 77;
        // Where the Service has another number.
        let elsewhere = Service::new(SocketAddr::from(([10, 96, 0, 9], 80)), proto::UDP, &[]);
        let backends: Vec<SocketAddr> = (1..=4).map(backend).collect();
        let flags = by.flags();
        let here = Service { flags, ..Service::new(vip(), proto::UDP, &backends) };
        other.serve(&[elsewhere, here]);
        for port in 1000..1100 {
            let packet = datagram([10, 0, 0, 9], port);
            assert_eq!(reached(&one, &packet), reached(&other, &packet), "{by:?}");
        }
    }
}

#[test]
fn round_robin_takes_one_after_the_other() {
    let host = choosing(Algorithm::RoundRobin, proto::UDP);
    let order: Vec<IpAddr> =
        (1000..1008).map(|port| reached(&host, &datagram([10, 0, 0, 9], port))).collect();
    let wanted = [1, 2, 3, 4, 1, 2, 3, 4].map(|number| backend(number).ip());
    assert_eq!(order, wanted);
}

#[test]
fn least_conn_takes_the_less_busy_of_two_for_its_weight() {
    let mut host = choosing(Algorithm::LeastConn, proto::UDP);
    // Twenty flows each but for the third, which has none: whoever is compared with it loses.
    *host.loads.borrow_mut() = [(0, 20), (1, 20), (2, 0), (3, 20)].into();
    let next = |host: &Host<V4>, port| reached(host, &datagram([10, 0, 0, 9], port));
    let seen = counts((1000..1030).map(|port| next(&host, port)));
    let most = *seen.values().max().unwrap();
    assert_eq!(seen.get(&backend(3).ip()), Some(&most), "{seen:?}");
    let loads = host.loads.borrow().clone();
    assert_eq!(loads.values().sum::<u32>(), 90, "each flow is counted");
    // Ten times the weight, ten times the flows.
    host.backends[0].weight = 10;
    *host.loads.borrow_mut() = [(0, 90), (1, 11), (2, 11), (3, 11)].into();
    let seen = counts((2000..2020).map(|port| next(&host, port)));
    let most = *seen.values().max().unwrap();
    assert_eq!(seen.get(&backend(1).ip()), Some(&most), "{seen:?}");
}

#[test]
fn a_connection_that_ends_is_a_load_no_more() {
    let host = choosing(Algorithm::LeastConn, proto::TCP);
    let client = SocketAddr::from(([10, 0, 0, 9], 1000));
    let segment = |flags| Packet::tcp(Ingress, client, vip(), flags);
    let chosen = SocketAddr::new(reached(&host, &segment(SYN)), 80);
    let load = || host.loads.borrow().values().sum::<u32>();
    let answer = |flags| {
        host.see(Hook::Egress, &Packet::tcp(Egress, chosen, client, flags).frame());
    };
    answer(SYN | ACK);
    reached(&host, &segment(ACK));
    assert_eq!(load(), 1);
    reached(&host, &segment(FIN | ACK));
    assert_eq!(load(), 1);
    // Both ends have said goodbye; and once is enough.
    answer(FIN | ACK);
    answer(FIN | ACK);
    reached(&host, &segment(ACK));
    assert_eq!(load(), 0);
}
