//! What the agent and the command line keep for themselves in pinned maps.

use crate::map_type;
use crate::settings::Lifetimes;

map_type! {
    /// The one element of the map `config`.
    pub struct Config {
        /// The contract's number, [`crate::abi::ABI`].
        pub abi: u32,
        /// Seed of the flow hash. Kept, so that a flow chooses the same backend after a restart.
        pub seed: u32,
        /// How long flows live, as the programs were told.
        pub lifetimes: Lifetimes,
        /// See [`crate::settings::Settings::takeover_until`]: kept, so that it does not begin anew with each agent.
        pub takeover_until: u32,
    }
}

map_type! {
    /// A Service port's name, zero-padded UTF-8, so that listings work while no agent runs.
    pub struct Name {
        /// The Service's namespace.
        pub namespace: [u8; 64],
        /// The Service's name.
        pub service: [u8; 64],
        /// The port's name; empty for the only port of a Service.
        pub port: [u8; 64],
        /// The transport protocol, as [`crate::proto`] numbers it.
        pub proto: u8,
        /// Zero.
        pub pad: [u8; 7],
    }
}

map_type! {
    /// What went through a Service port, both directions together. 16 bytes.
    pub struct Traffic {
        /// Packets.
        pub packets: u64,
        /// Their bytes, link-layer headers included.
        pub bytes: u64,
    }
}
