//! What only the host can do: time that passes, tables that fill, packets that can't be written.

use std::net::SocketAddr;

use proxy_common::settings::ticks;
use proxy_common::tables::Side::{Egress, Ingress};
use proxy_common::testing::{Packet, Service};
use proxy_common::{Outcome, V4, proto};

use crate::host::{Buffer, Host};
use crate::{ACK, SYN, client, pod, vip};

fn serving(proto: u8, backends: &[SocketAddr]) -> Host<V4> {
    let mut host = Host::new();
    host.serve(&[Service { frontend: vip(), proto, backends: backends.to_vec() }]);
    host
}

/// What is done with a segment of the client.
fn sent(host: &Host<V4>, flags: u8) -> Outcome {
    host.see(Ingress, &Packet::tcp(Ingress, client(), vip(), flags).frame()).0
}

/// What is done with a segment of the pod.
fn answered(host: &Host<V4>, flags: u8) -> Outcome {
    host.see(Egress, &Packet::tcp(Egress, pod(), client(), flags).frame()).0
}

fn pass(host: &Host<V4>, seconds: u64) {
    host.now.set(host.now.get() + ticks(seconds));
}

#[test]
fn an_idle_connection_ends_after_its_time_and_not_before() {
    let host = serving(proto::TCP, &[pod()]);
    assert_eq!(
        (sent(&host, SYN), answered(&host, SYN | ACK)),
        (Outcome::Opened, Outcome::Established)
    );
    pass(&host, 6 * 3600 - 2);
    assert_eq!(sent(&host, ACK), Outcome::Forwarded);
    // The pod's direction has been idle for longer, but the connection lives by either.
    pass(&host, 3600);
    assert_eq!(answered(&host, ACK), Outcome::Replied);
    pass(&host, 6 * 3600 + 2);
    assert_eq!(sent(&host, ACK), Outcome::Opened);
}

#[test]
fn an_unanswered_flow_ends_after_a_minute() {
    let host = serving(proto::TCP, &[pod()]);
    assert_eq!(sent(&host, SYN), Outcome::Opened);
    pass(&host, 58);
    assert_eq!(sent(&host, SYN), Outcome::Forwarded);
    pass(&host, 63);
    assert_eq!(sent(&host, SYN), Outcome::Opened);
}

#[test]
fn a_half_closed_connection_lives_for_an_hour_kp_116() {
    const FIN: u8 = 1;
    let host = serving(proto::TCP, &[pod()]);
    sent(&host, SYN);
    answered(&host, SYN | ACK);
    assert_eq!(sent(&host, FIN | ACK), Outcome::Forwarded);
    pass(&host, 3500);
    assert_eq!(answered(&host, ACK), Outcome::Replied);
    assert_eq!(answered(&host, FIN | ACK), Outcome::Replied);
    // Both have finished: the last ACK, then seconds.
    assert_eq!(sent(&host, ACK), Outcome::Forwarded);
    pass(&host, 15);
    assert_eq!(answered(&host, ACK), Outcome::NotService);
}

#[test]
fn a_reset_that_the_other_end_ignores_costs_no_connection() {
    const RST: u8 = 4;
    let host = serving(proto::TCP, &[pod()]);
    sent(&host, SYN);
    answered(&host, SYN | ACK);
    assert_eq!(sent(&host, RST), Outcome::Forwarded);
    pass(&host, 5);
    assert_eq!((answered(&host, ACK), sent(&host, ACK)), (Outcome::Replied, Outcome::Forwarded));
    pass(&host, 3600);
    assert_eq!(answered(&host, ACK), Outcome::Replied);
    // One that is heeded ends the flow in seconds.
    assert_eq!(answered(&host, RST), Outcome::Replied);
    pass(&host, 15);
    assert_eq!(answered(&host, ACK), Outcome::NotService);
}

#[test]
fn a_full_table_refuses_new_flows_and_keeps_old_ones() {
    let mut host = serving(proto::TCP, &[pod()]);
    assert_eq!(
        (sent(&host, SYN), answered(&host, SYN | ACK)),
        (Outcome::Opened, Outcome::Established)
    );
    for capacity in [2, 3] {
        host.capacity = capacity;
        let newcomer = SocketAddr::new(client().ip(), 50_000);
        let syn = Packet::tcp(Ingress, newcomer, vip(), SYN).frame();
        assert_ne!(host.see(Ingress, &syn).0, Outcome::TableFull);
        let answer = Packet::tcp(Egress, pod(), newcomer, SYN | ACK).frame();
        assert_eq!(host.see(Egress, &answer).0, Outcome::TableFull);
        assert_eq!(host.flows(), 2, "half a flow was left");
        assert_eq!(
            (sent(&host, ACK), answered(&host, ACK)),
            (Outcome::Forwarded, Outcome::Replied)
        );
    }
}

#[test]
fn without_a_free_source_port_a_flow_is_refused() {
    let mut host = serving(proto::UDP, &[pod()]);
    let frontends: Vec<SocketAddr> =
        (1..4).map(|host| SocketAddr::from(([10, 96, 0, host], 80))).collect();
    let services = frontends.iter().map(|frontend| Service {
        frontend: *frontend,
        proto: proto::UDP,
        backends: vec![pod()],
    });
    host.serve(&services.collect::<Vec<_>>());
    host.settings.port_count = 1;
    let outcomes = frontends
        .iter()
        .map(|vip| host.see(Ingress, &Packet::udp(Ingress, client(), *vip).frame()).0);
    let outcomes: Vec<Outcome> = outcomes.collect();
    assert_eq!(outcomes, [Outcome::Opened, Outcome::Opened, Outcome::NoPort]);
}

#[test]
fn a_packet_that_can_not_be_written_is_said_so() {
    for backends in [&[pod()][..], &[]] {
        let host = serving(proto::TCP, backends);
        let mut buffer = Buffer::new(&Packet::tcp(Ingress, client(), vip(), SYN).frame());
        buffer.writable = false;
        assert_eq!(host.see_buffer(Ingress, &mut buffer), Outcome::NotWritable);
    }
}
