//! The layout of every map, by topic.
//!
//! | map | kind | key → value | writer | reader |
//! |---|---|---|---|---|
//! | `services_v4/6` | hash | [`ServiceKey`] → [`ServiceValue`] | agent | datapath |
//! | `slots` | array, memory-mapped | half of the slot → two slots ([`Slots`]): positions or backend numbers | agent | datapath |
//! | `backends_v4/6` | array, memory-mapped | backend number → [`Backend`] | agent | datapath |
//! | `ways_v4/6` | array, memory-mapped | way number → [`Way`] | agent | datapath |
//! | `interest_v4/6` | array, memory-mapped | part of a hash of an address → [`Interest`] | agent | datapath |
//! | `ports` | array, memory-mapped | half of a port of the node's → two ports ([`Ports`]) | datapath, agent | datapath |
//! | `loads_v4/6` | array, memory-mapped | backend number → its flows (`u32`), for least-conn | datapath, agent's sweep | datapath |
//! | `turns` | array | service id → flows so far (`u32`), for round-robin | datapath | datapath |
//! | `affinity_v4/6` | LRU hash | [`AffinityKey`] → [`AffinityValue`] | datapath | datapath |
//! | `ranges_v4/6` | LPM trie | [`SourceRange`] → 1 (`u32`) | agent | datapath |
//! | `exits_v4/6` | LPM trie | [`ExitKey`] → [`Exit`] | agent | datapath |
//! | `flows_v4/6` | hash | [`FlowKey`] → [`FlowValue`] | datapath, agent's sweep and short cuts | datapath |
//! | `embryos_v4/6` | LRU hash | [`FlowKey`] → [`EmbryoValue`] | datapath | datapath |
//! | `wishes` | ring buffer | [`FlowKey`] of a client's masqueraded packets: a short cut is asked for | datapath | agent |
//! | `port_turns` | per-CPU array | hash of a destination → turns of its source ports (`u32`) | datapath | datapath |
//! | `exhausted_v4/6` | hash | backend number → flows that got no source port (`u64`) | datapath | agent |
//! | `traffic` | array | service id → [`Traffic`] | datapath, agent | agent, command line |
//! | `relays` | hash | index of a link with `portal_relay` that sends to others and takes from them → 1 (`u32`) | agent | datapath |
//! | `verified_v4/6` | LRU hash | [`FlowKey`] → [`Verified`] | `portal_relay` | `portal_relay` |
//! | `arrivals` | per-CPU array | 0 → [`Arrivals`] | `portal_relay` | datapath |
//! | `tails` | program array | story → program | agent | datapath |
//! | `fragments_v4/6` | LRU hash | [`FragmentKey`] → [`FragmentValue`] | datapath | datapath |
//! | `peers_v4/6` | LRU hash | [`PeerKey`] → [`PeerValue`] | socket hooks | socket hooks, agent |
//! | `asked_v4/6` | socket storage | [`Asked`] | socket hooks | socket hooks |
//! | `names` | hash | service id → [`Name`] | agent | command line |
//! | `outcomes` | per-CPU array | `Outcome` → count (`u64`) | datapath | agent, command line |
//! | `outcomes_swept` | array | `Outcome` → what records had counted that the sweep removed (`u64`) | agent | agent, command line |
//! | `config` | array | 0 → [`Config`] | agent | agent, command line |
//! | `scratch_v4/6` | per-CPU array | 0 → [`Work`] | datapath | datapath |

pub mod config;
pub mod exit;
pub mod flow;
pub mod fragment;
pub mod guard;
pub mod interest;
pub mod peer;
pub mod record;
pub mod service;
pub mod short_cut;
pub mod state;
pub mod work;

pub use config::{Config, Name, Traffic};
pub use exit::{Exit, ExitData, ExitKey};
pub use flow::{EmbryoValue, Facts, FlowKey, FlowValue, Making, Origin, Side, expired, tag};
pub use fragment::{FragmentKey, FragmentValue};
pub use guard::{Arrivals, Verified};
pub use interest::{Interest, Kind, Kinds, Ports, Spot};
pub use peer::{Asked, PeerKey, PeerValue};
pub use record::{EmbryoRecord, FlowRecord};
pub use service::{
    AffinityKey, AffinityValue, Algorithm, Backend, Choice, Range, RangeData, ServiceKey,
    ServiceValue, Slots, SourceRange, Way,
};
pub use short_cut::ShortCut;
pub use state::State;
pub use work::{Decision, LastResort, Memory, Packet, Part, Request, Work};
