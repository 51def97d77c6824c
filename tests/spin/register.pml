/*
 * The register: one version of it, agreed by three keepers.
 *
 * Single-decree Paxos. The value is who owns a block: nobody (0), or peer 1 or
 * 2. Two proposers with B ballots between them want to grant the block to peer
 * 1 and to peer 2; they take over what may have been agreed already. A peer takes
 * the block when it learns that a version which grants it was agreed. Never
 * may both do that.
 *
 * What is kept: promises and accepted values, which survive restarts. Messages
 * are lost, late, repeated and out of order: what was once sent may be received
 * at any time, any number of times, so that sets of what was sent do for them.
 * Ballot b belongs to proposer 1 when it is odd.
 *
 * What is left out: the chain of versions. A version is begun by who knows the
 * one before, all of them the same one, and promises about it are void when it
 * is known, so each is an agreement of its own. Who learns of a version learns
 * of it from who saw it agreed.
 *
 * With one of these the model leaves a guard out, and must then fail:
 *  NO_MAJORITY     one keeper that accepted is enough
 *  FORGET          a keeper comes back without its disk, as the same keeper
 *  NOT_TAKEN_OVER  a proposer proposes its own value whatever it was told
 *  NOT_HIGHEST     it takes over any value that it was told
 *  LATE_ACCEPT     a keeper accepts below what it promised
 */
#define K 3
#ifndef B
#define B 3
#endif
#define AT(b, k) ((b) * K + (k))

#ifdef NO_MAJORITY
#define NEEDED 1
#else
#define NEEDED 2
#endif

byte promised[K], accepted[K], value[K];	/* on the keepers' disks; ballot 0: none */
bool prepared[B + 1];				/* sent: prepare of a ballot */
bool promise[(B + 1) * K];			/* sent: promise, with what was accepted before */
byte before[(B + 1) * K], beforeValue[(B + 1) * K];
byte proposed[B + 1];				/* sent: accept, with its value; 0: not yet */
bool accepts[(B + 1) * K];			/* sent: accepted */
bool took[3];					/* peers that took the block */

#define PROMISES(b) (promise[AT(b, 0)] + promise[AT(b, 1)] + promise[AT(b, 2)])
#define ACCEPTS(b) (accepts[AT(b, 0)] + accepts[AT(b, 1)] + accepts[AT(b, 2)])

#ifdef NOT_HIGHEST
#define HIGHER(b, k) (before[AT(b, k)] > 0)
#else
#define HIGHER(b, k) (before[AT(b, k)] > high)
#endif
#ifdef LATE_ACCEPT
#define ACCEPTABLE(b, k) true
#else
#define ACCEPTABLE(b, k) (b >= promised[k])
#endif

active proctype all()
{
	byte b, k, v, high, not;

	do
	:: atomic { select(b : 1 .. B); prepared[b] = true; b = 0 }
	:: atomic {	/* a keeper promises */
		select(b : 1 .. B); select(k : 0 .. K - 1);
		if
		:: prepared[b] && b > promised[k] ->
			promised[k] = b; promise[AT(b, k)] = true;
			before[AT(b, k)] = accepted[k]; beforeValue[AT(b, k)] = value[k]
		:: else
		fi;
		b = 0; k = 0
	}
	:: atomic {	/* a proposer proposes: two promises, of all but keeper not */
		select(b : 1 .. B); select(not : 0 .. K - 1);
		if
		:: proposed[b] == 0 && PROMISES(b) - promise[AT(b, not)] >= 2 ->
			v = 0; high = 0; k = 0;
			do
			:: k < K ->
				if :: k != not && HIGHER(b, k) -> high = before[AT(b, k)]; v = beforeValue[AT(b, k)] :: else fi;
				k++
			:: else -> break
			od;
#ifdef NOT_TAKEN_OVER
			v = 0;
#endif
			if :: v == 0 -> v = (b % 2 == 1 -> 1 : 2) :: else fi;
			proposed[b] = v
		:: else
		fi;
		b = 0; k = 0; v = 0; high = 0; not = 0
	}
	:: atomic {	/* a keeper accepts */
		select(b : 1 .. B); select(k : 0 .. K - 1);
		if
		:: proposed[b] > 0 && ACCEPTABLE(b, k) ->
			promised[k] = b; accepted[k] = b; value[k] = proposed[b]; accepts[AT(b, k)] = true
		:: else
		fi;
		b = 0; k = 0
	}
	:: atomic {	/* a peer learns that it was agreed */
		select(b : 1 .. B);
		if
		:: proposed[b] > 0 && ACCEPTS(b) >= NEEDED -> took[proposed[b]] = true
		:: else
		fi;
		b = 0;
		assert(!(took[1] && took[2]))
	}
#ifdef FORGET
	:: atomic { select(k : 0 .. K - 1); promised[k] = 0; accepted[k] = 0; value[k] = 0; k = 0 }
#endif
	od
}
