//! The datapath on the host beside a model of a NAT, over random packets. `cargo xtask fuzz` lets it see ten million.

use proxy_common::settings::Lifetimes;
use proxy_common::testing::search::{Datapath, search};
use proxy_common::testing::{Hook, Service};
use proxy_common::{Outcome, V4, V6};
use proxy_ebpf::testing::{Buffer, Host, HostFamily};

/// How many packets are seen of each family if nothing else is asked for.
const PACKETS: u64 = 60_000;

/// So many packets are seen in a tick: what is done or held for some ticks is met, too.
const PER_TICK: u64 = 20;

struct OnHost<F: HostFamily> {
    host: Host<F>,
    seen: u64,
}

impl<F: HostFamily> Datapath for OnHost<F> {
    type Frame = Buffer;
    const CARRIES_NOTES: bool = true;

    fn serve(&mut self, services: &[Service]) {
        self.host.serve(services);
    }

    fn frame(&self, bytes: &[u8]) -> Buffer {
        Buffer::new(bytes)
    }

    fn bytes(&self, frame: &Buffer) -> Vec<u8> {
        frame.bytes.clone()
    }

    fn see(&mut self, hook: Hook, frame: &mut Buffer) -> Outcome {
        self.seen += 1;
        if self.seen.is_multiple_of(PER_TICK) {
            self.host.now.set(self.host.now.get().wrapping_add(1));
        }
        self.host.see_buffer(hook, frame)
    }

    fn lose(&mut self, rng: &mut fastrand::Rng) {
        for (key, _) in self.host.embryos() {
            if rng.u8(0..4) == 0 {
                self.host.evict(&key);
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
        let mut host = Host::<F>::new();
        host.capacity = capacity;
        // No flow of the model is too old.
        let [syn, tcp, half_closed, hold, udp, udp_stream] = [Lifetimes::DEFAULT.tcp; 6];
        host.settings.lifetimes = Lifetimes { syn, tcp, half_closed, hold, udp, udp_stream };
        search(&mut OnHost { host, seen: 0 }, is_v6, seed, packets / 2);
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
