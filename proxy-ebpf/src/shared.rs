//! The maps and settings of neither family, and what the datapath does with them.

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_RB_NO_WAKEUP};
use aya_ebpf::btf_maps::{Array, HashMap, PerCpuArray, RingBuf};
use aya_ebpf::helpers::{
    bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_jiffies64, bpf_ktime_get_ns,
};
use aya_ebpf::macros::btf_map;
use proxy_common::settings::{Settings, TICK_SHIFT};
use proxy_common::tables::{Arrivals, Config, FlowKey, Name, Ports, Slots, Traffic};
use proxy_common::{Family, Port};

use crate::counters::{add, bump};

/// Elements are made when they are needed.
pub const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;
/// The agent has the map in its memory.
pub const MAPPED: usize = BPF_F_MMAPABLE as usize;

/// Service ports, and frontends of a family.
pub const SERVICES: usize = 131_072;
const SLOTS: usize = 4_194_304;
/// Uplinks with XDP.
const LINKS: usize = 256;
const PORT_TURNS: usize = 4_096;
/// In bytes: some thousand wishes between two looks of the agent, which is a second.
const WISHES_SIZE: usize = 1 << 17;

/// The agent's settings, frozen at load.
#[unsafe(no_mangle)]
static SETTINGS: Global<Settings> = Global::new(Settings::DEFAULT);

#[btf_map(name = "config")]
static CONFIG: Array<Config, 1> = Array::new();
#[btf_map(name = "names")]
static NAMES: HashMap<u32, Name, SERVICES, ON_DEMAND> = HashMap::new();
#[btf_map(name = "slots")]
static SLOT_NUMBERS: Array<Slots, { SLOTS / 2 }, MAPPED> = Array::new();

#[btf_map(name = "turns")]
static TURNS: Array<u32, SERVICES> = Array::new();
#[btf_map(name = "ports")]
static PORTS: Array<Ports, { Ports::COUNT }, MAPPED> = Array::new();
#[btf_map(name = "port_turns")]
static PORT_TURN: PerCpuArray<u32, PORT_TURNS> = PerCpuArray::new();
#[btf_map(name = "traffic")]
static TRAFFIC: Array<Traffic, SERVICES, MAPPED> = Array::new();
/// Keys of both families: their lengths tell them apart.
#[btf_map(name = "wishes")]
static WISHES: RingBuf<u64, WISHES_SIZE> = RingBuf::new();
#[btf_map(name = "relays")]
static RELAYS: HashMap<u32, u32, LINKS, ON_DEMAND> = HashMap::new();
#[btf_map(name = "arrivals")]
static ARRIVALS: PerCpuArray<Arrivals, 1> = PerCpuArray::new();

/// Whether a link takes part in sending from link to link before the host stack.
#[inline(always)]
pub fn relays(link: u32) -> bool {
    RELAYS.get_ptr(link).is_some()
}

/// One of the settings; see [`proxy_ebpf::datapath::Tables::setting`].
#[inline(always)]
pub fn setting<T: Copy>(field: impl Fn(&Settings) -> &T) -> T {
    let settings = (&raw const SETTINGS).cast::<Settings>();
    // SAFETY: `Global` is a transparent wrapper, and the loader filled it with a value of
    // this Pod type. Volatile, or the compiler would fold the initial value.
    unsafe { core::ptr::from_ref(field(&*settings)).read_volatile() }
}

/// The time in ticks.
#[inline(always)]
pub fn now() -> u32 {
    let clock = setting(|s| &s.clock);
    let time = if clock.jiffy != 0 {
        // SAFETY: the helper only reads a counter.
        clock.time(unsafe { bpf_jiffies64() })
    } else {
        // SAFETY: the helper only reads a clock.
        unsafe { bpf_ktime_get_ns() }
    };
    (time >> TICK_SHIFT) as u32
}

/// The time in microseconds; wraps.
#[inline(always)]
pub fn microseconds() -> u32 {
    // SAFETY: the helper only reads a clock.
    (unsafe { bpf_ktime_get_ns() } / 1_000) as u32
}

/// A random number.
#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: the helper only makes a number.
    unsafe { bpf_get_prandom_u32() }
}

/// What is in a slot.
#[inline(always)]
pub fn slot(index: u32) -> Option<u32> {
    let [even, odd] = SLOT_NUMBERS.get(index / 2)?.numbers;
    Some(if index.is_multiple_of(2) { even } else { odd })
}

/// Notes that a port of the node's is one to which answers come in.
#[inline(always)]
pub fn take_port(port: Port) {
    let (element, half) = Ports::place(port);
    if let Some(ports) = PORTS.get_ptr_mut(element) {
        // SAFETY: all that is ever written there is the same word. Other CPUs read it: it is written once.
        unsafe {
            let taken = &raw mut (*ports).taken[half];
            if taken.read_volatile() == 0 {
                taken.write_volatile(1);
            }
        }
    }
}

/// Whether a port of the node's is of interest.
#[inline(always)]
pub fn is_port(port: Port) -> bool {
    let (element, half) = Ports::place(port);
    PORTS.get(element).is_some_and(|ports| ports.taken[half] | ports.served[half] != 0)
}

/// How many flows a Service port has chosen backends for in turn; counts one more.
#[inline(always)]
pub fn turn(service: u32) -> u32 {
    TURNS.get_ptr_mut(service).map_or(0, |turns| bump(turns, |turn| turn.wrapping_add(1)))
}

/// Adds to what went through a Service port.
#[inline(always)]
pub fn count_traffic(service: u32, packets: u32, bytes: u32) {
    if let Some(traffic) = TRAFFIC.get_ptr_mut(service) {
        // SAFETY: both are within an element of an array map, which is never freed.
        unsafe {
            add(&raw mut (*traffic).packets, packets.into());
            add(&raw mut (*traffic).bytes, bytes.into());
        }
    }
}

/// A turn of a destination's source ports.
#[inline(always)]
pub fn next_port(destination: u32) -> u32 {
    // Every CPU has turns of its own: two at once would look at the same place.
    let turn = PORT_TURN
        .get_ptr_mut(destination % PORT_TURNS as u32)
        .map_or(0, |turns| bump(turns, |turn| turn.wrapping_add(1)));
    // SAFETY: the helper has no preconditions.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    turn.wrapping_mul(setting(|s| &s.cpus)).wrapping_add(cpu)
}

/// How many TCP flows have begun, as this CPU has seen them at XDP.
#[inline(always)]
pub fn arrivals() -> Arrivals {
    ARRIVALS.get(0).copied().unwrap_or(Arrivals { tick: 0, count: 0 })
}

/// Counts one more. How many there are in this tick then.
#[inline(always)]
pub fn count_arrival(now: u32) -> u32 {
    let Some(arrivals) = ARRIVALS.get_ptr_mut(0) else { return 0 };
    // SAFETY: the element is this CPU's own, where programs at XDP run one after the other.
    unsafe {
        *arrivals = (*arrivals).one_more(now);
        (*arrivals).count
    }
}

/// Asks the agent for a short cut.
#[inline(always)]
pub fn wish<F: Family>(key: &FlowKey<F>) {
    // One that finds no room is made again later. The agent looks by itself: it need not be woken.
    let _ = WISHES.output_untyped::<FlowKey<F>>(key, u64::from(BPF_RB_NO_WAKEUP));
}
