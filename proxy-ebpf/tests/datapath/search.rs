//! The datapath on the host beside a model of a NAT, over random packets. `cargo xtask fuzz` lets it see ten million.

use proxy_common::testing::search::{Datapath, search};
use proxy_common::testing::{Hook, Service};
use proxy_common::{Outcome, V4, V6};
use proxy_ebpf::testing::{Buffer, Host, HostFamily};

/// How many packets are seen of each family if nothing else is asked for.
const PACKETS: u64 = 60_000;

struct OnHost<F: HostFamily>(Host<F>);

impl<F: HostFamily> Datapath for OnHost<F> {
    type Frame = Buffer;
    const CARRIES_NOTES: bool = true;

    fn serve(&mut self, services: &[Service]) {
        self.0.serve(services);
    }

    fn frame(&self, bytes: &[u8]) -> Buffer {
        Buffer::new(bytes)
    }

    fn bytes(&self, frame: &Buffer) -> Vec<u8> {
        frame.bytes.clone()
    }

    fn see(&mut self, hook: Hook, frame: &mut Buffer) -> Outcome {
        self.0.see_buffer(hook, frame)
    }

    fn lose(&mut self, rng: &mut fastrand::Rng) {
        for (key, _) in self.0.embryos() {
            if rng.u8(0..4) == 0 {
                self.0.evict(&key);
            }
        }
    }
}

fn number(variable: &str, otherwise: u64) -> u64 {
    let given = std::env::var(variable).ok();
    given.map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}")))
}

/// With room for all live flows, and for four records of them.
fn of_family<F: HostFamily>(is_v6: bool) {
    let packets = number("PORTAL_FUZZ_PACKETS", PACKETS);
    let seed = number("PORTAL_FUZZ_SEED", 1);
    for (seed, capacity) in (seed..).zip([usize::MAX, 4]) {
        let mut host = OnHost(Host::<F>::new());
        host.0.capacity = capacity;
        search(&mut host, is_v6, seed, packets / 2);
    }
}

#[test]
fn random_ipv4_packets_become_what_the_model_says() {
    of_family::<V4>(false);
}

#[test]
fn random_ipv6_packets_become_what_the_model_says() {
    of_family::<V6>(true);
}
