//! Portal's agent, in the order in which a Service change travels:
//!
//! [`watch`] (objects come in) → [`model`] (plain facts) → [`desired`] (what the kernel should hold) →
//! [`plan`] (the writes that make it so) → [`kernel`] (the one writer).
//!
//! [`run`] wires them together. [`model`], [`desired`] and [`plan`]
//! are pure: no I/O, no clock, no await.

pub mod agent;
pub mod catch_all;
pub mod cli;
pub mod desired;
pub mod events;
pub mod exits;
pub mod health;
pub mod http;
pub mod kernel;
pub mod links;
pub mod memory;
pub mod model;
pub mod netlink;
pub mod node;
pub mod plan;
pub mod retries;
pub mod routes;
pub mod run;
#[cfg(feature = "testing")]
pub mod testing;
pub mod watch;
