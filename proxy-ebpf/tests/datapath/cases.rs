//! The cases that the kernel runs too.

use std::collections::BTreeSet;

use proxy_common::testing::{Case, Step, cases};
use proxy_common::{Outcome, V4, V6};
use proxy_ebpf::testing::{Host, HostFamily};

fn is_v4(case: &Case) -> bool {
    case.name.starts_with("IPv4")
}

/// Once with the bits of what is of interest as they are, and once with all of them set: they decide nothing.
fn run<F: HostFamily>(case: &Case) -> BTreeSet<Outcome> {
    let mut vague = Host::<F>::new();
    vague.interests.all = true;
    run_on(case, vague);
    run_on(case, Host::<F>::new())
}

fn run_on<F: HostFamily>(case: &Case, mut host: Host<F>) -> BTreeSet<Outcome> {
    let mut seen = BTreeSet::new();
    for (number, step) in case.steps.iter().enumerate() {
        let place = format!("{}, step {number}", case.name);
        match step {
            Step::Services(services) => host.serve(services),
            Step::Packet { hook, frame, outcome, becomes } => {
                let (done, bytes) = host.see(*hook, frame);
                seen.insert(done);
                assert_eq!(done, *outcome, "{place}");
                becomes.check(&place, frame, &bytes);
            }
        }
    }
    seen
}

#[test]
fn every_case_and_between_them_every_outcome() {
    let mut seen = BTreeSet::new();
    for case in cases() {
        seen.extend(if is_v4(&case) { run::<V4>(&case) } else { run::<V6>(&case) });
    }
    let elsewhere = [
        // Told by the hook, before there is a family.
        Outcome::NotIp,
        // catch.rs
        Outcome::Caught,
        // ways.rs
        Outcome::ShortCut,
        // guard.rs
        Outcome::Challenged,
        Outcome::Verified,
        // life.rs
        Outcome::NoSource,
        Outcome::NoPort,
        Outcome::TableFull,
        Outcome::NotWritable,
        // sockets.rs
        Outcome::SocketTranslated,
        Outcome::SocketRefused,
        Outcome::SocketRestored,
    ];
    let all: BTreeSet<Outcome> = Outcome::ALL.iter().copied().collect();
    seen.extend(elsewhere);
    assert_eq!(seen, all);
}
